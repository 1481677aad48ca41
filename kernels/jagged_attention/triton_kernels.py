# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernels of jagged attention. Weights live in registers only: they are computed anew for each gradient.

Source of the scheme: FlashAttention-2 (Dao, arXiv 2307.08691, algorithms 1 and 2), here without atomics: one kernel walks over the keys
of a block of queries, one over the queries of a block of keys, and one over the pairs of blocks at the same distance.

All kernels take these arguments. Tensors: Q, K, V, Y, DY and the gradients ``[S, H, E]``, BIAS ``[H or 1, distances]``, OFFSETS
``[B + 1]``, SEEN int32 ``[S]`` and MOST int32 ``[B]`` (of the prefix mask: how many of its row's first tokens a token sees, and any token
of the row), TILES ``[programs, 2]`` (row and start of each block, B for none), LSE and DELTA ``[H, S]`` float32. Numbers: ``between`` is
how far one head's bias lies behind another's, ``scale`` 1 / √e, ``inverse`` 1 / N. Constants: PREFIX for the
prefix mask, WIDE for products in float32, which Triton's interpreter needs.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    Q, K, V, BIAS, OFFSETS, SEEN, MOST, TILES, Y, LSE, S, H, group, distances, between, scale, inverse,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, SOFTMAX: tl.constexpr, PREFIX: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a block of queries of one head reads; for softmax with its log-sum-exp."""
    head = tl.program_id(1)
    i0, begin, length = _block(OFFSETS, TILES, tl.program_id(0), S)
    if i0 >= length:
        return
    first, stride = (begin * H + head) * E, H * E
    i = i0 + tl.arange(0, BLOCK)
    q = _rows(Q + first, i, length, stride, E, BLOCK_E, WIDE)
    y = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    prefix = _prefix(SEEN + begin, i, length, group, PREFIX)
    most = tl.max(prefix, 0)
    for step in range(0, _steps(i0, most, BLOCK, PREFIX)):
        j0 = _key_block(step, i0, most, BLOCK, PREFIX)
        j = j0 + tl.arange(0, BLOCK)
        k = _rows(K + first, j, length, stride, E, BLOCK_E, WIDE)
        v = _rows(V + first, j, length, stride, E, BLOCK_E, WIDE)
        scores = _scores(q, k, BIAS + head * between, i[:, None] - j[None, :], distances, scale, BIASED, PRECISION)
        seen = _seen(i[:, None], j[None, :], prefix[:, None], PREFIX)
        if SOFTMAX:
            scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp(scores - base[:, None])
            kept = tl.exp(top - base)
            total = total * kept + tl.sum(weights, 1)
            y = y * kept[:, None]
            top = higher
        else:
            weights = tl.where(seen, scores * tl.sigmoid(scores) * inverse, 0.0)
        y += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if SOFTMAX:
        total = tl.where(i < length, total, 1.0)
        y = y / total[:, None]
        tl.store(LSE + head.to(tl.int64) * S + begin + i, top + tl.log(total), mask=i < length)
    _store(Y + first, y, i, length, stride, E, BLOCK_E)


@triton.jit
def query_grad_kernel(
    Q, K, V, BIAS, OFFSETS, SEEN, MOST, TILES, DY, LSE, DELTA, Y, DQ, S, H, group, distances, between, scale, inverse,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, SOFTMAX: tl.constexpr, PREFIX: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries; for softmax also DELTA, the sum of dy·y of each query, which the other kernels read."""
    head = tl.program_id(1)
    i0, begin, length = _block(OFFSETS, TILES, tl.program_id(0), S)
    if i0 >= length:
        return
    first, stride = (begin * H + head) * E, H * E
    i = i0 + tl.arange(0, BLOCK)
    q = _rows(Q + first, i, length, stride, E, BLOCK_E, WIDE)
    dy = _rows(DY + first, i, length, stride, E, BLOCK_E, WIDE)
    lse, delta = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if SOFTMAX:
        y = _rows(Y + first, i, length, stride, E, BLOCK_E, WIDE)
        delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
        place = head.to(tl.int64) * S + begin + i
        tl.store(DELTA + place, delta, mask=i < length)
        lse = tl.load(LSE + place, mask=i < length, other=float("inf"))
    dq = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    prefix = _prefix(SEEN + begin, i, length, group, PREFIX)
    most = tl.max(prefix, 0)
    for step in range(0, _steps(i0, most, BLOCK, PREFIX)):
        j0 = _key_block(step, i0, most, BLOCK, PREFIX)
        j = j0 + tl.arange(0, BLOCK)
        k = _rows(K + first, j, length, stride, E, BLOCK_E, WIDE)
        v = _rows(V + first, j, length, stride, E, BLOCK_E, WIDE)
        scores = _scores(q, k, BIAS + head * between, i[:, None] - j[None, :], distances, scale, BIASED, PRECISION)
        seen = _seen(i[:, None], j[None, :], prefix[:, None], PREFIX)
        dweights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        _, slope = _weights(scores, seen, lse[:, None], inverse, SOFTMAX)
        dscores = slope * (dweights - delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)
    _store(DQ + first, dq * scale, i, length, stride, E, BLOCK_E)


@triton.jit
def key_grad_kernel(
    Q, K, V, BIAS, OFFSETS, SEEN, MOST, TILES, DY, LSE, DELTA, DK, DV, S, H, group, distances, between, scale, inverse,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, SOFTMAX: tl.constexpr, PREFIX: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values."""
    head = tl.program_id(1)
    j0, begin, length = _block(OFFSETS, TILES, tl.program_id(0), S)
    if j0 >= length:
        return
    first, stride = (begin * H + head) * E, H * E
    j = j0 + tl.arange(0, BLOCK)
    k = _rows(K + first, j, length, stride, E, BLOCK_E, WIDE)
    v = _rows(V + first, j, length, stride, E, BLOCK_E, WIDE)
    dk, dv = tl.zeros((BLOCK, BLOCK_E), tl.float32), tl.zeros((BLOCK, BLOCK_E), tl.float32)
    lse, delta = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    start, end = j0, length
    if PREFIX:
        most = tl.load(MOST + tl.load(TILES + 2 * tl.program_id(0)))
        end = tl.where(j0 < most, length, tl.minimum(j0 + BLOCK, length))
    else:
        start = j0 // group * group // BLOCK * BLOCK
    for i0 in range(start, end, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        q = _rows(Q + first, i, length, stride, E, BLOCK_E, WIDE)
        dy = _rows(DY + first, i, length, stride, E, BLOCK_E, WIDE)
        if SOFTMAX:
            place = head.to(tl.int64) * S + begin + i
            lse = tl.load(LSE + place, mask=i < length, other=float("inf"))
            delta = tl.load(DELTA + place, mask=i < length, other=0.0)
        scores = _scores(q, k, BIAS + head * between, i[:, None] - j[None, :], distances, scale, BIASED, PRECISION)
        prefix = _prefix(SEEN + begin, i, length, group, PREFIX)
        seen = _seen(i[:, None], j[None, :], prefix[:, None], PREFIX)
        weights, slope = _weights(scores, seen, lse[:, None], inverse, SOFTMAX)
        dv += tl.dot(tl.trans(weights.to(dy.dtype)), dy, input_precision=PRECISION)
        dweights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        dscores = slope * (dweights - delta[:, None])
        dk += tl.dot(tl.trans(dscores.to(q.dtype)), q, input_precision=PRECISION)
    _store(DK + first, dk * scale, j, length, stride, E, BLOCK_E)
    _store(DV + first, dv, j, length, stride, E, BLOCK_E)


@triton.jit
def bias_grad_kernel(
    Q, K, V, BIAS, OFFSETS, SEEN, MOST, TILES, DY, LSE, DELTA, SUMS, tiles, last, S, H, group, distances, between, scale, inverse,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, SOFTMAX: tl.constexpr, PREFIX: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores, summed over all pairs of blocks of a share of TILES that are equally far apart.

    SUMS is ``[shares, last + 2, H, BLOCK, BLOCK]``. Band 0 takes the keys of later blocks, band c those c - 1 blocks before the query,
    band ``last + 1`` those ``last`` or more blocks before it.
    """
    share, band, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for tile in range(share, tiles, tl.num_programs(0)):
        i0, begin, length = _block(OFFSETS, TILES, tile, S)
        first, stride = (begin * H + head) * E, H * E
        i = i0 + tl.arange(0, BLOCK)
        prefix = _prefix(SEEN + begin, i, length, group, PREFIX)
        nearest = i0 - (band - 1) * BLOCK
        start = tl.where(band == 0, nearest, tl.where(band > last, 0, tl.maximum(nearest, 0)))
        end = tl.where(band == 0, tl.minimum(tl.max(prefix, 0), length), nearest + 1)
        if (i0 < length) & (start < end):
            q = _rows(Q + first, i, length, stride, E, BLOCK_E, WIDE)
            dy = _rows(DY + first, i, length, stride, E, BLOCK_E, WIDE)
            lse, delta = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            if SOFTMAX:
                place = head.to(tl.int64) * S + begin + i
                lse = tl.load(LSE + place, mask=i < length, other=float("inf"))
                delta = tl.load(DELTA + place, mask=i < length, other=0.0)
            for j0 in range(start, end, BLOCK):
                j = j0 + tl.arange(0, BLOCK)
                k = _rows(K + first, j, length, stride, E, BLOCK_E, WIDE)
                v = _rows(V + first, j, length, stride, E, BLOCK_E, WIDE)
                scores = _scores(q, k, BIAS + head * between, i[:, None] - j[None, :], distances, scale, BIASED, PRECISION)
                seen = _seen(i[:, None], j[None, :], prefix[:, None], PREFIX)
                dweights = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
                _, slope = _weights(scores, seen, lse[:, None], inverse, SOFTMAX)
                sums += slope * (dweights - delta[:, None])
    place = ((share * tl.num_programs(1) + band) * H + head).to(tl.int64) * BLOCK * BLOCK
    within = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(SUMS + place + within, sums)


@triton.jit
def _block(OFFSETS, TILES, tile, S):
    """Where a block starts in its row, where the row begins, and how long it is: a length of 0 for a block too many."""
    row, start = tl.load(TILES + 2 * tile), tl.load(TILES + 2 * tile + 1)
    begin = tl.load(OFFSETS + row)
    end = tl.load(OFFSETS + row + 1, mask=begin < S, other=0)
    length = tl.maximum(end - begin, 0).to(tl.int32)
    return start, begin, length


@triton.jit
def _rows(X, places, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr):
    """[BLOCK, BLOCK_E]: one head of the tokens at ``places`` of a row, zeros behind its end."""
    at, mask = _at(X, places, length, stride, E, BLOCK_E)
    x = tl.load(at, mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(X, x, places, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The counterpart of `_rows`."""
    at, mask = _at(X, places, length, stride, E, BLOCK_E)
    tl.store(at, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _at(X, places, length, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Addresses and mask of `_rows`. Tensors start at a multiple of 16 bytes, so heads that fill a block do as well."""
    cols = tl.arange(0, BLOCK_E)
    at = X + (places * stride)[:, None] + cols[None, :]
    mask = (places < length)[:, None]
    if E < BLOCK_E:
        mask = mask & (cols < E)[None, :]
    else:
        at = tl.multiple_of(tl.max_contiguous(at, [1, BLOCK_E]), [1, 16])
    return at, mask


@triton.jit
def _scores(a, b, BIAS, back, distances, scale, BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK, BLOCK]: scaled products of two blocks, with the bias at the distances ``back``."""
    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * scale
    if BIASED:
        scores += tl.load(BIAS + tl.minimum(tl.maximum(back, 0), distances - 1)).to(tl.float32)
    return scores


@triton.jit
def _prefix(SEEN, i, length, group, PREFIX: tl.constexpr):
    """[BLOCK]: how many of its row's first tokens each query sees. A group of 1 is the causal mask.

    Queries behind the row's end see what they may: their upstream gradients are zeros and their results are not stored.
    """
    return tl.load(SEEN + i, mask=i < length, other=0) if PREFIX else tl.minimum(i // group * group + group, length)


@triton.jit
def _seen(i, j, prefix, PREFIX: tl.constexpr):
    """Whether the query at i sees the key at j; all broadcast."""
    return (j < prefix) | (j == i) if PREFIX else j < prefix


@triton.jit
def _steps(i0, most, BLOCK: tl.constexpr, PREFIX: tl.constexpr):
    """How many blocks of keys a block of queries multiplies with: those of its longest prefix, and with the prefix mask its own."""
    blocks = (most + BLOCK - 1) // BLOCK
    return tl.minimum(blocks, i0 // BLOCK) + 1 if PREFIX else blocks


@triton.jit
def _key_block(step, i0, most, BLOCK: tl.constexpr, PREFIX: tl.constexpr):
    """Where such a block begins; its own comes last."""
    return tl.where(step * BLOCK < tl.minimum(most, i0), step * BLOCK, i0) if PREFIX else step * BLOCK


@triton.jit
def _weights(scores, seen, lse, inverse, SOFTMAX: tl.constexpr):
    """The weights, and by what a weight's gradient becomes its score's: the weight itself for softmax, SiLU's slope over N else."""
    if SOFTMAX:
        weights = tl.where(seen, tl.exp(scores - lse), 0.0)
        slope = weights
    else:
        gate = tl.where(seen, tl.sigmoid(scores), 0.0)
        weights = scores * gate * inverse
        slope = gate * inverse + weights * (1 - gate)
    return weights, slope
