# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def"
"""The kernels of selected attention. A program takes BLOCK_M queries of one unit (see `kernels.selected_attention.shape.Layout`).

Source of the scheme: FlashAttention-2 (Dao, arXiv 2307.08691), with rows of keys loaded by index, and for few queries its split over keys
("flash-decoding"). No gathered copy of keys exists, and no atomic is used: a key's gradient is written for each block that lists it and
summed over these in ascending order.

Tensors: Q, DY and Y ``[B, H, T, ·]``, INDEX and VALID ``[B, G, Q, K]``, LSE and DELTA ``[B, H, T]`` float32, all contiguous; K and V
``[B, H_kv, N, ·]`` with the distances k_b … v_n. Numbers: ``units`` P, ``rows`` R, ``size`` queries of one head in a block, ``sharing``
query heads of a key head, ``groups`` of the choice for each batch row (1 or H_kv). Constants: OWN for query heads that choose apart,
CAUSAL for queries with a last place, WIDE for products in float32, which Triton's interpreter needs.
"""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    Q, K, V, INDEX, VALID, LAST, Y, LSE, span, total, units, rows, size, sharing, key_heads, groups, blocks, length, kept, keys,
    k_b, k_h, k_n, v_b, v_h, v_n, scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What BLOCK_M queries read among ``span`` entries of their choice, with its log-sum-exp, in share ``program_id(1)`` of Y and LSE.

    Where there is one share, a query that reads nothing gets zeros and +∞; otherwise -∞, and `combine_kernel` does the rest.
    """
    batch, head, unit, tile = _place(units, tl.cdiv(rows, BLOCK_M), key_heads)
    at, place, inside = _queries(unit, tile, rows, size, blocks, length, BLOCK_M, OWN)
    first = (batch * key_heads + head) * sharing * length
    choice = _choice(batch, head, unit, groups, units, kept)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, kept)
    q = _rows(Q + first * E, at.to(tl.int64) * E, inside, E, BLOCK_E, WIDE)
    bound = _bound(LAST, place, inside, CAUSAL)
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    y = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key, counts = _keys(INDEX + choice, VALID + choice, start + tl.arange(0, BLOCK_N), end, keys)
        k = _rows(K, key.to(tl.int64) * k_n, counts, E, BLOCK_E, WIDE)
        v = _rows(V, key.to(tl.int64) * v_n, counts, EV, BLOCK_EV, WIDE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = counts[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= bound[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        faded = tl.exp(top - base)
        weight = weight * faded + tl.sum(weights, 1)
        y = y * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    first += tl.program_id(1).to(tl.int64) * total
    nothing = weight == 0
    y = y / tl.where(nothing, 1.0, weight)[:, None]
    lse = tl.where(nothing, float("-inf"), top + tl.log(tl.where(nothing, 1.0, weight)))
    if tl.num_programs(1) == 1:
        lse = tl.where(nothing, float("inf"), lse)
    tl.store(LSE + first + at, lse, mask=inside)
    _store(Y + first * EV, y, at.to(tl.int64) * EV, inside, EV, BLOCK_EV)


@triton.jit
def combine_kernel(SHARES, SHARE_LSE, Y, LSE, shares, total, EV: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_M: tl.constexpr):
    """One result from SHARES ``[shares, total, EV]`` and SHARE_LSE ``[shares, total]`` for BLOCK_M of the ``total`` = B H T queries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = at < total
    y = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_M,), tl.float32)
    for share in range(0, shares):
        place = tl.cast(share, tl.int64) * total + at
        lse = tl.load(SHARE_LSE + place, mask=inside, other=float("-inf"))
        higher = tl.maximum(top, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded, new = tl.exp(top - base), tl.exp(lse - base)
        y = y * faded[:, None] + _rows(SHARES, place * EV, inside, EV, BLOCK_EV, False) * new[:, None]
        weight = weight * faded + new
        top = higher
    nothing = weight == 0
    y = y / tl.where(nothing, 1.0, weight)[:, None]
    tl.store(LSE + at, tl.where(nothing, float("inf"), top + tl.log(tl.where(nothing, 1.0, weight))), mask=inside)
    _store(Y, y, at * EV, inside, EV, BLOCK_EV)


@triton.jit
def query_grad_kernel(
    Q, K, V, INDEX, VALID, LAST, DY, LSE, DELTA, Y, DQ, units, rows, size, sharing, key_heads, groups, blocks, length, kept, keys,
    k_b, k_h, k_n, v_b, v_h, v_n, scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M queries, and DELTA, the sum of dy·y of each, which `slot_grad_kernel` reads."""
    batch, head, unit, tile = _place(units, tl.cdiv(rows, BLOCK_M), key_heads)
    at, place, inside = _queries(unit, tile, rows, size, blocks, length, BLOCK_M, OWN)
    first = (batch * key_heads + head) * sharing * length
    choice = _choice(batch, head, unit, groups, units, kept)
    q = _rows(Q + first * E, at.to(tl.int64) * E, inside, E, BLOCK_E, WIDE)
    dy = _rows(DY + first * EV, at.to(tl.int64) * EV, inside, EV, BLOCK_EV, WIDE)
    y = _rows(Y + first * EV, at.to(tl.int64) * EV, inside, EV, BLOCK_EV, WIDE)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(DELTA + first + at, delta, mask=inside)
    lse = tl.load(LSE + first + at, mask=inside, other=float("inf"))
    bound = _bound(LAST, place, inside, CAUSAL)
    K += batch * k_b + head * k_h
    V += batch * v_b + head * v_h
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, kept, BLOCK_N):
        key, counts = _keys(INDEX + choice, VALID + choice, start + tl.arange(0, BLOCK_N), kept, keys)
        k = _rows(K, key.to(tl.int64) * k_n, counts, E, BLOCK_E, WIDE)
        v = _rows(V, key.to(tl.int64) * v_n, counts, EV, BLOCK_EV, WIDE)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = counts[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= bound[:, None])
        weights = tl.where(seen, tl.exp(scores - lse[:, None]), 0.0)
        dscores = weights * (tl.dot(dy, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq += tl.dot(dscores.to(k.dtype), k, input_precision=PRECISION)
    _store(DQ + first * E, dq * scale, at.to(tl.int64) * E, inside, E, BLOCK_E)


@triton.jit
def slot_grad_kernel(
    Q, K, V, INDEX, VALID, LAST, DY, LSE, DELTA, DK, DV, units, rows, size, sharing, key_heads, groups, blocks, length, kept, keys,
    k_b, k_h, k_n, v_b, v_h, v_n, scale,
    E: tl.constexpr, EV: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_EV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OWN: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What a unit adds to the gradients of BLOCK_N of the keys and values that it lists, in DK and DV ``[B, H_kv, P, K, ·]`` float32."""
    batch, head, unit, tile = _place(units, tl.cdiv(kept, BLOCK_N), key_heads)
    first = (batch * key_heads + head) * sharing * length
    choice = _choice(batch, head, unit, groups, units, kept)
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key, counts = _keys(INDEX + choice, VALID + choice, slot, kept, keys)
    k = _rows(K + batch * k_b + head * k_h, key.to(tl.int64) * k_n, counts, E, BLOCK_E, WIDE)
    v = _rows(V + batch * v_b + head * v_h, key.to(tl.int64) * v_n, counts, EV, BLOCK_EV, WIDE)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_EV), tl.float32)
    for step in range(0, tl.cdiv(rows, BLOCK_M)):
        at, place, inside = _queries(unit, step, rows, size, blocks, length, BLOCK_M, OWN)
        q = _rows(Q + first * E, at.to(tl.int64) * E, inside, E, BLOCK_E, WIDE)
        dy = _rows(DY + first * EV, at.to(tl.int64) * EV, inside, EV, BLOCK_EV, WIDE)
        bound = _bound(LAST, place, inside, CAUSAL)
        lse = tl.load(LSE + first + at, mask=inside, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        seen = counts[:, None]
        if CAUSAL:
            seen = seen & (key[:, None] <= bound[None, :])
        weights = tl.where(seen, tl.exp(scores - lse[None, :]), 0.0)
        dv += tl.dot(weights.to(dy.dtype), dy, input_precision=PRECISION)
        delta = tl.load(DELTA + first + at, mask=inside, other=0.0)
        dscores = weights * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(dscores.to(q.dtype), q, input_precision=PRECISION)
    to = ((batch * key_heads + head) * units + unit) * kept + slot
    _store(DK, dk * scale, to * E, slot < kept, E, BLOCK_E)
    _store(DV, dv, to * EV, slot < kept, EV, BLOCK_EV)


@triton.jit
def key_sum_kernel(
    SLOTS, ORDER, STARTS, OUT, key_heads, groups, listed, keys, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """The gradient of BLOCK_N keys in OUT ``[B, H_kv, N, E]``: the sum of the rows of SLOTS ``[B, H_kv, listed, E]`` that name each.

    ORDER ``[B, G, listed]`` has the entries that name key 0 first, then those that name key 1 …, and STARTS ``[B, G, N + 1]`` where each
    key's begin.
    """
    batch, head, _, tile = _place(1, tl.cdiv(keys, BLOCK_N), key_heads)
    group = batch * groups + tl.minimum(head, groups - 1)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = key < keys
    start = tl.load(STARTS + group * (keys + 1) + key, mask=inside, other=0)
    end = tl.load(STARTS + group * (keys + 1) + key + 1, mask=inside, other=0)
    SLOTS += (batch * key_heads + head) * listed * E
    total = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for step in range(0, tl.max(end - start, 0).to(tl.int32)):
        there = start + step < end
        slot = tl.load(ORDER + group * listed + start + step, mask=there, other=0)
        total += _rows(SLOTS, slot * E, there, E, BLOCK_E, False)
    _store(OUT, total, ((batch * key_heads + head) * keys + key) * E, inside, E, BLOCK_E)


@triton.jit
def _place(units, tiles, key_heads):
    """Batch row and key head (64 bits), unit and tile of this program; the tiles of a unit run one after another."""
    program = tl.program_id(0)
    pair = (program // (units * tiles)).to(tl.int64)
    return pair // key_heads, pair % key_heads, program // tiles % units, program % tiles


@triton.jit
def _queries(unit, tile, rows, size, blocks, length, BLOCK_M: tl.constexpr, OWN: tl.constexpr):
    """Of BLOCK_M queries of a unit: where each lies among those of its key head, its place among T, and whether there is one."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if OWN:
        member, block, within = row * 0 + unit // blocks, unit % blocks, row
    else:
        member, block, within = row // size, unit, row % size
    place = block * size + within
    return member * length + place, place, (row < rows) & (place < length)


@triton.jit
def _choice(batch, head, unit, groups, units, kept):
    """Where a unit's entries begin in INDEX and VALID."""
    return ((batch * groups + tl.minimum(head, groups - 1)) * units + unit) * kept


@triton.jit
def _keys(INDEX, VALID, slot, end, keys):
    """The places that the entries ``slot`` name, and whether they count; behind ``end`` there are none."""
    key = tl.load(INDEX + slot, mask=slot < end, other=-1)
    counts = tl.load(VALID + slot, mask=slot < end, other=0) != 0
    return key, counts & (key >= 0) & (key < keys)


@triton.jit
def _bound(LAST, place, inside, CAUSAL: tl.constexpr):
    """The last key that each query may read; -1 for none."""
    if CAUSAL:
        return tl.load(LAST + place, mask=inside, other=-1)
    else:
        return place


@triton.jit
def _rows(X, first, inside, E: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr):
    """[rows, BLOCK_E]: the E numbers from each of ``first`` on, zeros where there is no row. Rows that fill a block lie at 16 bytes."""
    cols = tl.arange(0, BLOCK_E)
    at = X + first[:, None] + cols[None, :]
    mask = inside[:, None]
    if E < BLOCK_E:
        mask = mask & (cols < E)[None, :]
    else:
        at = tl.multiple_of(tl.max_contiguous(at, [1, BLOCK_E]), [1, 16])
    x = tl.load(at, mask=mask, other=0.0)
    if WIDE:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(X, x, first, inside, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The counterpart of `_rows`."""
    cols = tl.arange(0, BLOCK_E)
    tl.store(X + first[:, None] + cols[None, :], x.to(X.dtype.element_ty), mask=inside[:, None] & (cols < E)[None, :])
