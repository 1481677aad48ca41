# SPDX-License-Identifier: Apache-2.0
"""TokenSelect: the properties of the paper, and what every sparse attention holds."""

import pytest
import torch
from torch.nn.functional import max_pool1d, scaled_dot_product_attention

from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.token_select import SelectionCache, TokenSelectAttention, head_logits, head_vote, paged_dot

B, H, G, N, D = 3, 4, 2, 60, 8
ARANGE, LAST = torch.arange(N), torch.tensor([N - 1])
SMALL = {"min_length": 0, "keep": 6, "initial": 3, "local": 5, "chunk": 8}


def drawn(seed=0, batch=B, queries=N, keys=N, heads=H, groups=G):
    torch.manual_seed(seed)
    shapes = (batch, heads, queries, D), (batch, groups, keys, D), (batch, groups, keys, D)
    return tuple(torch.randn(*s, dtype=torch.float64) for s in shapes)


def module_of(**config):
    return TokenSelectAttention(TokenSelectAttention.Config(**(SMALL | config)))


def repeated(x, heads=H):
    return x.repeat_interleave(heads // x.shape[1], 1)


def sets(selection, b):
    return selection.index[b, 0, 0][selection.valid[b, 0, 0]].tolist()


def rotate(x, positions):
    """A rotary embedding, pairs (i, i + e/2)."""
    half = x.shape[-1] // 2
    angle = (positions[..., None] * 50.0 ** (-torch.arange(half) / half)).to(x.dtype)[:, None]
    one, two = x[..., :half], x[..., half:]
    return torch.cat((one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()), -1)


def brute_middle(query, k, begin, stop, keep):
    """The vote of one row by its definition: query [H, e], k [H_kv, N, e]."""
    votes = torch.zeros(k.shape[1], dtype=torch.float64)
    for h in range(len(query)):
        votes[begin:stop] += (k[h // (len(query) // len(k)), begin:stop] @ query[h]).softmax(0)
    places = sorted(range(begin, stop), key=lambda j: -votes[j].item())
    return set(places[:keep])


# 1


@pytest.mark.parametrize("lengths", [None, torch.tensor([N, 33, 0])])
@pytest.mark.parametrize("positions", [ARANGE, None])
@pytest.mark.parametrize(
    "config", [{"keep": N - 3 - 5}, {"keep": 100}, {"keep": N, "initial": 0, "local": 0}, {"initial": 100, "local": 100}]
)
@pytest.mark.parametrize("representative", ["first", "mean"])
def test_1_a_budget_for_all_is_dense(lengths, positions, config, representative):
    q, k, v = drawn()
    found = module_of(**config, representative=representative)(q, k, v, query_positions=positions, lengths=lengths)
    torch.testing.assert_close(found, dense_attend(q, k, v, query_positions=positions, lengths=lengths), atol=1e-10, rtol=0)


def test_1_one_less_is_not():
    q, k, v = drawn()
    found = module_of(keep=N - 3 - 5 - 1)(q, k, v)
    assert not torch.allclose(found, dense_attend(q, k, v), atol=1e-10)


# 2


def test_2_each_head_has_one_vote():
    q, k, _ = drawn()
    inside = torch.rand(B, N) > 0.3
    logits = head_logits(q[:, :, 0], k)
    votes = head_vote(logits, inside)
    torch.testing.assert_close(votes.sum(1), torch.full((B,), float(H), dtype=torch.float64))
    assert bool((votes[~inside] == 0).all()) and bool((votes[inside] > 0).all())
    loud = logits * torch.tensor([10.0, 1.0, 1.0, 1.0])[:, None]
    torch.testing.assert_close(head_vote(loud, inside).sum(1), votes.sum(1))
    assert not torch.equal(loud.sum(1).topk(6).indices.sort().values, logits.sum(1).topk(6).indices.sort().values)  # as raw sums do
    share = (logits * 0.5).masked_fill(~inside[:, None], -torch.inf).softmax(-1).sum(1)
    torch.testing.assert_close(head_vote(logits, inside, 0.5), share)


def test_2_a_loud_head_does_not_outvote_the_others():
    quiet = torch.tensor([0.0, 4.0, 0.0, 0.0])
    logits = torch.stack((torch.tensor([90.0, 0.0, 89.0, 88.0]), quiet, quiet))[None]
    assert head_vote(logits, torch.ones(1, 4, dtype=torch.bool)).argmax() == 1 and logits.sum(1).argmax() == 0


def test_2_votes_are_counted_in_single_precision_and_nobody_is_no_nan():
    logits = torch.zeros(1, 2, 5000, dtype=torch.bfloat16)
    votes = head_vote(logits, torch.ones(1, 5000, dtype=torch.bool))
    assert votes.dtype == torch.float32
    torch.testing.assert_close(votes.sum(), torch.tensor(2.0))
    assert bool((head_vote(logits, torch.zeros(1, 5000, dtype=torch.bool)) == 0).all())


def test_2_smoothing_is_the_maximum_of_the_neighbours():
    q, k, _ = drawn()
    inside = torch.ones(B, N, dtype=torch.bool)
    inside[1, 40:] = False
    logits = head_logits(q[:, :, 0], k)
    plain, smooth = head_vote(logits, inside), head_vote(logits, inside, smoothing=5)
    for b, n in ((0, N), (1, 40)):
        torch.testing.assert_close(smooth[b, :n], max_pool1d(plain[b : b + 1, :n], 5, 1, 2)[0])
    assert bool((smooth[1, 40:] == 0).all())
    assert not torch.equal(
        module_of(smoothing=5).choose(q[:, :, -1:], k, LAST, None).index, module_of().choose(q[:, :, -1:], k, LAST, None).index
    )


# 3


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_3_the_paged_product_is_gather_then_matmul(groups):
    torch.manual_seed(0)
    q, pages = torch.randn(B, H, D, dtype=torch.float64), torch.randn(200, groups, D, dtype=torch.float64)
    slots = torch.stack([torch.randperm(200)[:50] for _ in range(B)])
    expected = torch.empty(B, H, 50, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            expected[b, h] = pages[slots[b]][:, h // (H // groups)] @ q[b, h]
    torch.testing.assert_close(paged_dot(q, pages, slots), expected)
    slots[1, 30:] = -1
    found = paged_dot(q, pages, slots)
    assert bool((found[1, :, 30:] == -torch.inf).all())
    torch.testing.assert_close(found[1, :, :30], expected[1, :, :30])
    assert paged_dot(q, pages, slots[:, :0]).shape == (B, H, 0)


def test_3_the_paged_product_takes_part_in_the_choice():
    q, k, _ = drawn(queries=1, batch=1)
    order = torch.randperm(N)
    pages = torch.empty(N, G, D, dtype=torch.float64)
    pages[order] = k[0].transpose(0, 1)
    inside = torch.ones(1, N, dtype=torch.bool)
    torch.testing.assert_close(head_vote(paged_dot(q[:, :, 0], pages, order[None]), inside), head_vote(head_logits(q[:, :, 0], k), inside))


# 4, 5: the cache


def steps_of(module, cache, count=20, same=False, seed=0, keys=N):
    q, k, v = drawn(seed, keys=keys)
    out = []
    for t in range(keys - count, keys):
        query, seen = q[:, :, 0:1] if same else q[:, :, t : t + 1], slice(0, t + 1)
        out.append(module(query, k[:, :, seen], v[:, :, seen], query_positions=torch.tensor([t]), cache=cache))
    return torch.cat(out, 2)


def test_4_above_one_every_step_chooses_and_nothing_changes():
    cache, module = SelectionCache(), module_of(theta=1.01)
    found = steps_of(module, cache)
    assert cache.recomputed.tolist() == [20] * B
    torch.testing.assert_close(found, steps_of(module, None))


def test_4_at_minus_one_only_the_first_does():
    cache, module = SelectionCache(), module_of(theta=-1.0, refresh=1000)
    found = steps_of(module, cache)
    assert cache.recomputed.tolist() == [1] * B
    assert not torch.allclose(found, steps_of(module, None))


@pytest.mark.parametrize("refresh,times", [(None, 4), (7, 3), (1, 20)])
def test_4_a_choice_ages(refresh, times):
    cache = SelectionCache()
    steps_of(module_of(theta=-1.0, refresh=refresh), cache)
    assert cache.recomputed.tolist() == [times] * B  # 20 steps, n_local = 5


def test_4_what_was_chosen_stays_while_the_window_moves():
    module, cache = module_of(theta=-1.0), SelectionCache()
    q, k, v = drawn()
    middles = []
    for t in (50, 51, 54, 55):
        seen = slice(0, t + 1)
        found = module(q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen], query_positions=torch.tensor([t]), cache=cache)
        middles.append(sets(cache.chosen(), 0))
        read = [0, 1, 2, *middles[-1], *range(t - 5, t + 1)]
        assert len(set(read)) == len(read) == 3 + 6 + 5 + 1
        expected = scaled_dot_product_attention(q[:1, :, t : t + 1], repeated(k)[:1, :, read], repeated(v)[:1, :, read])
        torch.testing.assert_close(found[:1], expected)
    assert middles[0] == middles[1] == middles[2] != middles[3]


def test_5_the_same_query_again_hits_and_gives_the_same():
    q, k, v = drawn(queries=1)
    module, cache = module_of(), SelectionCache()
    outputs = [module(q, k, v, query_positions=LAST, cache=cache) for _ in range(3)]
    assert cache.recomputed.tolist() == [1] * B
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], module(q, k, v, query_positions=LAST))
    loud = module(3 * q, k, v, query_positions=LAST, cache=cache)  # cosines do not see the length
    assert cache.recomputed.tolist() == [1] * B and not torch.allclose(loud, outputs[0])


def test_5_likeness_is_to_the_query_that_chose():
    """The threshold is 25.8 degrees: a row turning by 10 must choose at 0, 30 and 60, whatever its batch mates do in between."""
    _, k, v = drawn()
    module, cache, base = module_of(), SelectionCache(), torch.eye(2, D, dtype=torch.float64)
    for step in range(9):
        angle = torch.deg2rad(step * torch.tensor([10.0, 30.0, 0.0], dtype=torch.float64))[:, None]
        query = (angle.cos() * base[0] + angle.sin() * base[1])[:, None, None].expand(B, H, 1, D)
        module(query, k, v, query_positions=LAST, cache=cache)
    assert cache.recomputed.tolist() == [3, 9, 1]


def test_5_each_row_decides_by_itself():
    q, k, v = drawn(queries=1)
    module, cache = module_of(), SelectionCache()
    module(q, k, v, query_positions=LAST, cache=cache)
    other = q.clone()
    other[1] = -other[1]
    found = module(other, k, v, query_positions=LAST, cache=cache)
    assert cache.recomputed.tolist() == [1, 2, 1]
    torch.testing.assert_close(found, module(other, k, v, query_positions=LAST))
    assert module(other, k, v, query_positions=LAST, cache=cache).equal(found) and cache.recomputed.tolist() == [1, 2, 1]


def test_5_rows_with_a_cache_do_not_know_their_batch_mates():
    together, module = steps_of(module_of(theta=0.2), SelectionCache()), module_of(theta=0.2)
    q, k, v = drawn()
    cache = SelectionCache()
    for i, t in enumerate(range(N - 20, N)):
        row = [x[1:2] for x in (q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])]
        torch.testing.assert_close(module(*row, query_positions=torch.tensor([t]), cache=cache), together[1:2, :, i : i + 1])
    assert 2 < int(cache.recomputed) < 20


def test_5_a_shorter_history_chooses_anew_and_beams_take_over_their_parents_choice():
    q, k, v = drawn(queries=1)
    module, cache = module_of(theta=-1.0), SelectionCache()
    module(q, k, v, query_positions=LAST, cache=cache)
    before = module(q, k[:, :, :40], v[:, :, :40], query_positions=torch.tensor([39]), cache=cache)
    assert cache.recomputed.tolist() == [2] * B
    parents = torch.tensor([2, 2, 0, 1])
    cache.reorder(parents)
    after = module(q[parents], k[parents][:, :, :40], v[parents][:, :, :40], query_positions=torch.tensor([39]), cache=cache)
    torch.testing.assert_close(after, before[parents])
    assert cache.recomputed.tolist() == [2] * 4


# 6, 7


@pytest.mark.parametrize("lengths", [None, torch.tensor([N, 30, 6])])
def test_6_forced_keys_are_there_and_exactly_k_others(lengths):
    q, k, _ = drawn()
    part = slice(40, 48)
    found = module_of().choose(q[:, :, part], k, ARANGE[part], lengths)
    for b in range(B):
        length = N if lengths is None else int(lengths[b])
        end, chosen = min(40, length), sets(found, b)
        assert chosen == sorted(set(chosen))
        forced = set(range(min(3, end))) | set(range(max(end - 5, 0), end)) | set(range(40, min(48, length)))
        assert forced <= set(chosen)
        assert set(chosen) - forced == brute_middle(q[b, :, 40], k[b], 3, max(end - 5, 3), 6)


def test_6_the_mean_and_the_scale_choose_where_they_are_asked_to():
    q, k, _ = drawn()
    part = slice(40, 48)
    forced = {0, 1, 2, *range(35, 48)}
    found = module_of(representative="mean", vote_scale=0.25).choose(q[:, :, part], k, ARANGE[part], None)
    assert all(set(sets(found, b)) - forced == brute_middle(q[b, :, part].mean(1) / 4, k[b], 3, 35, 6) for b in range(B))
    found = module_of().choose(q[:, :, part], k, None, None)  # no sequence: the mean, no keys of its own
    forced = {0, 1, 2, *range(55, N)}
    assert all(set(sets(found, b)) - forced == brute_middle(q[b, :, part].mean(1), k[b], 3, 55, 6) for b in range(B))


def test_7_one_head_is_plain_top_k():
    q, k, _ = drawn(heads=1, groups=1)
    found = module_of(initial=0, local=0).choose(q[:, :, -1:], k, LAST, None)
    for b in range(B):
        best = (k[b, 0, : N - 1] @ q[b, 0, -1]).topk(6).indices.tolist()
        assert sets(found, b) == sorted([*best, N - 1])


# what every sparse attention holds


@pytest.mark.parametrize("representative", ["first", "mean"])
def test_attention_is_softmax_over_the_chosen_keys_under_the_causal_mask(representative):
    q, k, v = drawn()
    module, mask = module_of(representative=representative), torch.zeros(B, 1, N, N, dtype=torch.bool)
    for begin in range(0, N, 8):
        part = slice(begin, min(begin + 8, N))
        mask[:, :, part] = module.choose(q[:, :, part], k, ARANGE[part], None).mask(N) & (ARANGE[part, None] >= ARANGE)
    expected = scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask.expand(-1, H, -1, -1), scale=0.3)
    torch.testing.assert_close(module(q, k, v, query_positions=ARANGE, scale=0.3), expected)
    own = torch.block_diag(*[torch.ones(8, 8, dtype=torch.bool).tril()] * 8)[:N, :N]
    assert bool(mask[:, :, own].all())
    assert torch.equal(module(q, k, v, query_positions=ARANGE), module(q, k, v, query_positions=ARANGE))


def test_no_later_token_has_an_influence_unless_the_mean_is_asked_for():
    q, k, v = drawn()
    for t in (20, 33, 39, 44, 57):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t + 1 :] = 10 * torch.randn_like(x[:, :, t + 1 :])
        found, before = (module_of()(*x, query_positions=ARANGE) for x in (changed, (q, k, v)))
        torch.testing.assert_close(found[:, :, : t + 1], before[:, :, : t + 1])
        mean = module_of(representative="mean")
        keys_only = mean(q, *changed[1:], query_positions=ARANGE)
        torch.testing.assert_close(keys_only[:, :, : t + 1], mean(q, k, v, query_positions=ARANGE)[:, :, : t + 1])


@pytest.mark.parametrize("positions", [ARANGE, None])
def test_a_row_does_not_know_its_batch_mates_nor_its_padding(positions):
    q, k, v = drawn()
    lengths, module = torch.tensor([N, 41, 0]), module_of(smoothing=3)
    together = module(q, k, v, query_positions=positions, lengths=lengths)
    assert bool((together[2] == 0).all())
    for b in (0, 1):
        rows = [x[b : b + 1].clone() for x in (q, k, v)]
        rows[1][:, :, lengths[b] :], rows[2][:, :, lengths[b] :] = 1e3, 1e3
        found = module(*rows, query_positions=positions, lengths=lengths[b : b + 1])
        torch.testing.assert_close(found, together[b : b + 1])


def test_gradients_flow_through_what_is_read():
    q, k, v = drawn(batch=1, keys=24, queries=24)
    inputs, positions = [x.requires_grad_() for x in (q, k, v)], torch.arange(24)
    module = module_of(keep=3, initial=1, local=2, chunk=5)
    assert torch.autograd.gradcheck(lambda *x: module(*x, query_positions=positions), inputs, eps=1e-7, atol=1e-5, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *x: module.extrapolate(*x, rotate, query_positions=positions), inputs, eps=1e-7, atol=1e-5, fast_mode=True
    )


def test_nothing_to_do_and_short_inputs():
    q, k, v = drawn()
    assert module_of()(q[:, :, :0], k, v).shape == (B, H, 0, D)
    assert module_of()(q[:0], k[:0], v[:0]).shape == (0, H, N, D)
    dense = dense_attend(q, k, v, query_positions=ARANGE)
    torch.testing.assert_close(module_of(min_length=N)(q, k, v, query_positions=ARANGE), dense)


# beyond the trained length


@pytest.mark.parametrize("config", [{"keep": N}, {"min_length": N}])
@pytest.mark.parametrize("lengths", [None, torch.tensor([N, 33, 0])])
def test_compacted_positions_of_everything_are_the_true_ones(config, lengths):
    q, k, v = drawn()
    found = module_of(**config).extrapolate(q, k, v, rotate, query_positions=ARANGE, lengths=lengths)
    turned = [rotate(x, ARANGE[None]) for x in (q, k)]
    dense = dense_attend(*turned, v, query_positions=ARANGE, lengths=lengths)
    held = torch.ones(B, N, dtype=torch.bool) if lengths is None else lengths[:, None] > ARANGE  # a query behind its row has no place
    torch.testing.assert_close(found.transpose(1, 2)[held], dense.transpose(1, 2)[held], atol=1e-10, rtol=0)


def test_compacted_positions_by_brute_force():
    q, k, v = drawn()
    module = module_of()
    found = module.extrapolate(q, k, v, rotate, query_positions=ARANGE)
    judged = rotate(q, torch.full((1, N), 5))
    for t in (7, 20, 40, 43, N - 1):
        begin = t // 8 * 8
        for b in range(B):
            stop = max(begin - 5, 3)
            middle = brute_middle(judged[b, :, begin], k[b], 3, stop, 6)
            forced = set(range(min(3, begin))) | set(range(max(begin - 5, 0), begin)) | set(range(begin, t + 1))
            read = sorted(middle | forced)
            places = torch.arange(len(read))[None]
            query, keys = rotate(q[b : b + 1, :, t : t + 1], places[:, -1:]), rotate(k[b : b + 1][:, :, read], places)
            expected = scaled_dot_product_attention(query, repeated(keys), repeated(v[b : b + 1][:, :, read]))
            torch.testing.assert_close(found[b : b + 1, :, t : t + 1], expected)


def test_positions_beyond_the_budget_never_occur():
    seen = []

    def watched(x, positions):
        seen.append(int(positions.max()))
        return rotate(x, positions)

    q, k, v = drawn(keys=400, queries=400)
    module_of().extrapolate(q, k, v, watched, query_positions=torch.arange(400))
    assert max(seen) == 3 + 6 + 5 + 8 - 1


def test_extrapolation_leaks_nothing_and_takes_a_cache():
    q, k, v = drawn()
    module = module_of(theta=1.01)
    before = module.extrapolate(q, k, v, rotate, query_positions=ARANGE)
    changed = [torch.cat((x[:, :, :44], torch.randn_like(x[:, :, 44:])), 2) for x in (q, k, v)]
    after = module.extrapolate(*changed, rotate, query_positions=ARANGE)
    torch.testing.assert_close(after[:, :, :44], before[:, :, :44])
    cache = SelectionCache()
    for _ in range(2):
        step = module.extrapolate(q[:, :, -1:], k, v, rotate, query_positions=LAST, cache=cache)
        torch.testing.assert_close(step, module.extrapolate(q[:, :, -1:], k, v, rotate, query_positions=LAST))
    assert cache.recomputed.tolist() == [2] * B


def test_what_is_wrong_is_named():
    q, k, v = drawn()
    with pytest.raises(ConfigError, match="odd number, got 2"):
        module_of(smoothing=2)
    with pytest.raises(ConfigError, match=r"one query.*got 60"):
        module_of()(q, k, v, query_positions=ARANGE, cache=SelectionCache())
    with pytest.raises(ConfigError, match="1 to 8 queries"):
        module_of().choose(q, k, ARANGE, None)
    cache = SelectionCache()
    module_of()(q[:, :, :1], k, v, cache=cache)
    with pytest.raises(ConfigError, match="2 rows, got one of 3"):
        module_of()(q[:2, :, :1], k[:2], v[:2], cache=cache)
