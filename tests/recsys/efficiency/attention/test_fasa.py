# SPDX-License-Identifier: Apache-2.0
"""FASA: the properties of the paper, and what every sparse attention holds."""

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.fasa import (
    DominantKeys,
    FasaAttention,
    agreement,
    contextual_agreement,
    frequency_logits,
    pair_columns,
)

B, H, G, N, D = 3, 4, 2, 50, 16
LAYOUTS = ["interleaved", "half"]
LAST = torch.tensor([N - 1])


def pairs_of(width, layout):
    """The columns of each pair, told one by one."""
    return [(2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + width // 2) for i in range(width // 2)]


def rotate(x, positions, layout, base=100.0):
    """Rotary positions by their definition: pair i is turned by position · base^(-2i/e)."""
    ones, others = (torch.tensor(c) for c in zip(*pairs_of(x.shape[-1], layout), strict=True))
    angle = positions.to(x.dtype)[:, None] * base ** (-2 * torch.arange(len(ones)) / x.shape[-1]).to(x.dtype)
    out, cos, sin = torch.empty_like(x), angle.cos(), angle.sin()
    out[..., ones], out[..., others] = (x[..., ones] * cos - x[..., others] * sin), (x[..., ones] * sin + x[..., others] * cos)
    return out


def drawn(seed=0, batch=B, queries=1, keys=N, groups=G, layout="half"):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, h, n, D, dtype=torch.float64) for h, n in ((H, queries), (groups, keys), (groups, keys)))
    places = torch.arange(keys)
    return rotate(q, places[keys - queries :], layout), rotate(k, places, layout), v


def module_of(layout="half", calibrate=True, groups=G, **config):
    settings = {"min_length": 0, "keep": 12, "dominant": 3, "recent": 2, "layout": layout} | config
    module = FasaAttention(FasaAttention.Config(**settings))
    if calibrate:
        module.calibrate([drawn(9, queries=6, layout=layout, groups=groups)[:2]])
    return module


def repeated(x):
    return x.repeat_interleave(H // x.shape[1], 1)


def sets(selection, b, h):
    return selection.index[b, h, 0][selection.valid[b, h, 0]].tolist()


# 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_1_the_pairs_logits_sum_to_the_logit(layout):
    q, k, _ = drawn(queries=5, layout=layout)
    logits = frequency_logits(q, k, layout)
    assert logits.shape == (B, H, 5, D // 2, N)
    torch.testing.assert_close(logits.sum(3), q @ repeated(k).transpose(-1, -2), atol=1e-10, rtol=0)
    for i, (one, two) in enumerate(pairs_of(D, layout)):
        own = [one, two]
        torch.testing.assert_close(logits[:, :, :, i], q[..., own] @ repeated(k)[..., own].transpose(-1, -2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_1_columns_of_pairs(layout):
    pairs = torch.tensor([[0, 3], [5, 7]])
    told = pairs_of(D, layout)
    assert pair_columns(pairs, D, layout).tolist() == [[*told[0], *told[3]], [*told[5], *told[7]]]


# 2, 3


@pytest.mark.parametrize("per", ["head", "key_head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_2_all_pairs_are_the_oracle_top_k(layout, per):
    q, k, _ = drawn(layout=layout)
    module = module_of(layout, dominant=D // 2, recent=0, per=per)
    logits = (q @ repeated(k).transpose(-1, -2))[:, :, 0]
    logits = logits if per == "head" else logits.unflatten(1, (G, -1)).sum(2)
    selection = module.choose(q, k, LAST, None)
    for b in range(B):
        for h in range(logits.shape[1]):
            assert sets(selection, b, h) == sorted(logits[b, h].topk(12).indices.tolist())


@pytest.mark.parametrize("lengths", [None, torch.tensor([N, 7, 0])])
@pytest.mark.parametrize("per", ["head", "key_head"])
@pytest.mark.parametrize("keep", [N - 1, N, N + 5])
def test_3_keeping_all_is_dense(lengths, per, keep):
    q, k, v = drawn()
    positions = torch.tensor([N - 2])  # N - 1 keys may be read
    found = module_of(keep=12, per=per)
    found.config = found.config.model_copy(update={"keep": keep})
    torch.testing.assert_close(
        found(q, k, v, query_positions=positions, lengths=lengths),
        dense_attend(q, k, v, query_positions=positions, lengths=lengths),
        atol=1e-10,
        rtol=0,
    )


def test_3_choosing_fewer_is_not_dense():
    q, k, v = drawn()
    assert not torch.allclose(module_of()(q, k, v), dense_attend(q, k, v))


# 4, 5, 6: calibration


@pytest.mark.parametrize("layout", LAYOUTS)
def test_4_agreement_is_a_share_and_whole_for_the_whole(layout):
    q, k, _ = drawn(queries=6, layout=layout)
    found, steps = contextual_agreement(q, k, 12, layout)
    assert found.shape == (H, D // 2) and steps == 6 * B
    assert bool(((found >= 0) & (found <= 1)).all()) and found.unique().numel() > 3
    logits = frequency_logits(q, k, layout)
    assert bool((agreement(logits.sum(3), logits.sum(3), 12) == 1).all())


def test_4_agreement_by_brute_force_leaves_out_short_steps_and_later_keys():
    q, k, _ = drawn(queries=N)
    found, steps = contextual_agreement(q, k, 12, "half")
    assert steps == B * (N - 12)
    total = torch.zeros(H, D // 2, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(12, N):
                seen = k[b, h // (H // G), : t + 1]
                best = set((seen @ q[b, h, t]).topk(12).indices.tolist())
                for i, (one, two) in enumerate(pairs_of(D, "half")):
                    part = seen[:, one] * q[b, h, t, one] + seen[:, two] * q[b, h, t, two]
                    total[h, i] += len(best & set(part.topk(12).indices.tolist())) / 12
    torch.testing.assert_close(found, total / steps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_5_planted_pairs_are_found(layout, groups):
    torch.manual_seed(0)
    planted = torch.tensor([2, 5, 0, 7])
    q, k, _ = drawn(queries=8, groups=groups, layout=layout)
    kept = torch.zeros(H, 1, D, dtype=torch.float64)
    for h, i in enumerate(planted.tolist()):
        kept[h, 0, list(pairs_of(D, layout)[i])] = 1.0
    module = FasaAttention(FasaAttention.Config(min_length=0, keep=12, dominant=1, recent=0, layout=layout))
    found = module.calibrate([(q * kept, k)])
    assert module.dominant_pairs[:, 0].tolist() == planted.tolist()
    assert bool((found[torch.arange(H), planted] == 1).all())
    one = (q * kept)[:, :, -1:]
    whole = (one @ repeated(k).transpose(-1, -2))[:, :, 0]
    chosen = module.choose(one, k, LAST, None)
    assert all(sets(chosen, b, h) == sorted(whole[b, h].topk(12).indices.tolist()) for b in range(B) for h in range(H))


def test_5_of_a_trained_head_the_dominant_pairs_agree_more_than_random_ones():
    torch.manual_seed(0)
    keys, width = 48, 16
    project = [torch.nn.Linear(width, D) for _ in range(2)]
    optimizer = torch.optim.Adam([p for m in project for p in m.parameters()], 1e-2)

    def batch(size=16):
        """Each query looks for the key with its content, wherever it stands: what slow pairs can do, and fast ones cannot."""
        x, target = torch.randn(size, keys, width), torch.randint(keys, (size,))
        q = project[0](x[torch.arange(size), target] + 0.1 * torch.randn(size, width))
        return (
            rotate(q[:, None, None], torch.tensor([keys - 1]), "half"),
            rotate(project[1](x)[:, None], torch.arange(keys), "half"),
            target,
        )

    for _ in range(80):
        q, k, target = batch()
        optimizer.zero_grad()
        cross_entropy((q @ k.transpose(-1, -2))[:, 0, 0], target).backward()
        optimizer.step()
    module = FasaAttention(FasaAttention.Config(min_length=0, keep=8, dominant=3, recent=0))
    module.calibrate([batch()[:2]])
    with torch.no_grad():
        logits = frequency_logits(*batch(64)[:2], "half")  # other data than what was calibrated on
    whole = logits.sum(3)

    def share(pairs):
        return float(agreement(logits[:, :, :, pairs].sum(3), whole, 8).mean())

    random = [share(torch.randperm(D // 2)[:3]) for _ in range(20)]
    assert share(module.dominant_pairs[0]) > sum(random) / 20 + 0.2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_6_shifting_all_positions_changes_no_pair(layout):
    torch.manual_seed(0)
    q, k = (torch.randn(B, h, n, D, dtype=torch.float64) for h, n in ((H, 1), (G, N)))
    near, far = (frequency_logits(rotate(q, LAST + c, layout), rotate(k, torch.arange(N) + c, layout), layout) for c in (0, 1000))
    torch.testing.assert_close(near, far)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    near, far = (frequency_logits(rotate(q, LAST + c, layout), rotate(k, torch.arange(N) + c, layout), other) for c in (0, 1000))
    assert not torch.allclose(near, far)  # what is not a rotary pair has no such right


def test_calibration_adds_up_over_samples_and_is_saved(tmp_path):
    samples = [drawn(s, queries=n)[:2] for s, n in ((1, 6), (2, 3))]
    module = module_of(calibrate=False)
    found = module.calibrate(samples)
    apart = [contextual_agreement(*s, 12, "half") for s in samples]
    torch.testing.assert_close(found, sum(a * n for a, n in apart) / sum(n for _, n in apart))
    for h in range(H):
        assert module.dominant_pairs[h].tolist() == sorted(found[h].topk(3).indices.tolist())
    again = module_of(calibrate=False)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.dominant_pairs, module.dominant_pairs)
    nested, other = (torch.nn.Sequential(m) for m in (module, module_of(calibrate=False)))
    other.load_state_dict(nested.state_dict())
    q, k, v = drawn()
    assert torch.equal(again(q, k, v), module(q, k, v)) and torch.equal(other[0](q, k, v), module(q, k, v))
    again.load_state_dict(module_of(calibrate=False).state_dict())
    assert again.dominant_pairs.numel() == 0


def test_pairs_for_key_heads_are_those_of_the_mean_agreement():
    q, k, _ = drawn(9, queries=6)
    found = module_of(per="key_head", calibrate=False).calibrate([(q, k)])
    torch.testing.assert_close(found, contextual_agreement(q, k, 12, "half")[0].view(G, 2, -1).mean(1))


# choosing and packed columns


@pytest.mark.parametrize("per", ["head", "key_head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_keys_score_by_the_dominant_pairs(layout, per):
    q, k, _ = drawn(layout=layout)
    module = module_of(layout, per=per)
    logits = frequency_logits(q, k, layout)[:, :, 0]
    pairs = module.dominant_pairs if per == "head" else module.dominant_pairs.repeat_interleave(2, 0)
    expected = torch.stack([logits[:, h, pairs[h]].sum(1) for h in range(H)], 1)
    expected = expected if per == "head" else expected.unflatten(1, (G, 2)).sum(2)
    packed = module.pack(k)
    assert packed.packed.shape == (B, H if per == "head" else G, 6, N)
    torch.testing.assert_close(packed.score(q)[:, :, 0], expected)


@pytest.mark.parametrize("steps", [[1] * 20, [5, 0, 9, 6], [20]])
def test_packed_keys_grow(steps):
    _, k, _ = drawn()
    module = module_of()
    packed, begin = module.pack(k[:, :, :30]), 30
    for n in steps:
        packed.append(k[:, :, begin : begin + n])
        begin += n
        assert len(packed) == begin and torch.equal(packed.packed, module.pack(k[:, :, :begin]).packed)


def test_packed_keys_seldom_move():
    _, k, _ = drawn(keys=300)
    packed, places = module_of().pack(k[:, :, :1]), set()
    for t in range(1, 300):
        packed.append(k[:, :, t : t + 1])
        places.add(packed.packed.stride(1))  # the room of a column, in keys
    assert len(places) <= 10


@pytest.mark.parametrize("per", ["head", "key_head"])
def test_decoding_with_kept_columns_is_decoding_without(per):
    q, k, v = drawn(queries=10)
    module = module_of(per=per)
    packed = module.pack(k[:, :, :40])
    for t in range(40, N):
        packed.append(k[:, :, t : t + 1])
        step, seen = q[:, :, t - 40 : t - 39], slice(0, t + 1)
        found = module(step, k[:, :, seen], v[:, :, seen], query_positions=torch.tensor([t]), packed=packed)
        torch.testing.assert_close(found, module(step, k, v, query_positions=torch.tensor([t])))


@pytest.mark.parametrize("per", ["head", "key_head"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_softmax_over_exactly_the_chosen_keys(per, groups):
    q, k, v = drawn(groups=groups)
    module = module_of(per=per, groups=groups)
    selection = module.choose(q, k, LAST, torch.tensor([N, 30, 5]))
    assert selection.valid.sum(-1).flatten(1).unique(dim=1).tolist() == [[12], [12], [5]]
    for b in range(B):
        for h in range(selection.index.shape[1]):
            chosen, length = sets(selection, b, h), (N, 30, 5)[b]
            assert chosen == sorted(set(chosen)) and chosen[-2:] == [length - 2, length - 1]
    mask = selection.mask(N).repeat_interleave(H // selection.index.shape[1], 1)
    expected = scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask, scale=0.3)
    found = module(q, k, v, query_positions=LAST, lengths=torch.tensor([N, 30, 5]), scale=0.3)
    torch.testing.assert_close(found, expected)


# what every sparse attention holds


def test_no_later_token_has_an_influence():
    q, k, v = drawn()
    module, positions = module_of(), torch.tensor([30])
    before = module(q, k, v, query_positions=positions)
    k[:, :, 31:], v[:, :, 31:] = 100.0, 100.0
    torch.testing.assert_close(module(q, k, v, query_positions=positions), before)
    torch.testing.assert_close(module(q, k[:, :, :31], v[:, :, :31]), before)


def test_a_row_does_not_know_its_batch_mates_nor_its_padding():
    q, k, v = drawn()
    module, lengths = module_of(), torch.tensor([N, 29, 0])
    together = module(q, k, v, lengths=lengths)
    assert bool((together[2] == 0).all())
    k[1, :, 29:], v[1, :, 29:] = 100.0, 100.0
    for b in (0, 1):
        rows = [x[b : b + 1] for x in (q, k, v)]
        torch.testing.assert_close(module(*rows, lengths=lengths[b : b + 1]), together[b : b + 1])
        cut = [rows[0], *(x[:, :, : lengths[b]] for x in rows[1:])]
        torch.testing.assert_close(module(*cut), together[b : b + 1])


def test_more_queries_are_dense_and_need_no_calibration():
    q, k, v = drawn(queries=5)
    positions = torch.arange(N - 5, N)
    found = module_of(calibrate=False)(q, k, v, query_positions=positions)
    torch.testing.assert_close(found, dense_attend(q, k, v, query_positions=positions))
    assert module_of()(q[:0, :, :1], k[:0], v[:0]).shape == (0, H, 1, D)


@pytest.mark.parametrize("per", ["head", "key_head"])
def test_gradients_flow_through_what_is_read(per):
    q, k, v = drawn(batch=1, keys=20)
    module = module_of(keep=6, per=per)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(module, inputs, eps=1e-7, atol=1e-5, fast_mode=True)


def test_what_is_missing_is_named():
    q, k, v = drawn()
    with pytest.raises(ConfigError, match=r"rotary positions.*calibrate"):
        module_of(calibrate=False)(q, k, v)
    with pytest.raises(ConfigError, match="one query"):
        module_of().choose(drawn(queries=2)[0], k, None, None)
    with pytest.raises(ConfigError, match="recent: expected at most keep = 4, got 5"):
        module_of(keep=4, recent=5)
    with pytest.raises(ConfigError, match="dominant: expected at most 8"):
        module_of(dominant=9)
    with pytest.raises(DataError, match="more than keep = 12"):
        module_of(calibrate=False).calibrate([(q, k[:, :, :12])])
    with pytest.raises(DataError, match="more than keep"):
        module_of(calibrate=False).calibrate([])
    with pytest.raises(DataError, match="heads and pairs"):
        module_of(calibrate=False).calibrate([(q, k), (q[:, :2], k)])
    with pytest.raises(ConfigError, match="even number"):
        frequency_logits(q[..., :5], k[..., :5], "half")
    with pytest.raises(ConfigError, match="dominant columns of 50 keys"):
        module_of()(q, k, v, packed=module_of().pack(k[:, :, 1:]))
    with pytest.raises(ConfigError, match="calibrated for wider heads"):
        module_of(dominant=8)(q[..., :4], k[..., :4], v)
    with pytest.raises(ConfigError, match="divide the 4 calibrated heads"):
        DominantKeys(torch.zeros(4, 2, dtype=torch.long)).append(k.repeat(1, 2, 1, 1)[:, :3])
    with pytest.raises(DataError, match="appended first"):
        _ = DominantKeys(torch.zeros(4, 2, dtype=torch.long)).packed
