# SPDX-License-Identifier: Apache-2.0
"""DSA's flat indexer and HISA in its place: the properties of the paper, and what every sparse attention holds."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import kl_div, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.hisa import DsaAttention, FlatIndexer, HisaAttention, HisaIndexer
from recsys.efficiency.attention.indexer import BlockMeans, IndexerProjection, IndexInputs, indexer_loss
from recsys.efficiency.selectors import top_recent

B, H, G, N, D = 2, 4, 2, 70, 8
ARANGE = torch.arange(N)


def drawn(seed=0, batch=B, keys=N, queries=N, heads=H, groups=G):
    torch.manual_seed(seed)
    shapes = (batch, heads, queries, D), (batch, groups, keys, D), (batch, groups, keys, D)
    return tuple(torch.randn(*s, dtype=torch.float64) for s in shapes)


def index_of(seed=0, groups=1, gates=True, **sizes):
    q, k, _ = drawn(seed, groups=groups, **sizes)
    return IndexInputs(q, k, torch.randn(q.shape[:3], dtype=torch.float64) if gates else None)


def attention(name, **config):
    kind = {"dsa": DsaAttention, "hisa": HisaAttention}[name]
    return kind(kind.Config(min_length=0, **config))


SMALL = [
    ("dsa", {"keep": 9, "chunk": 16}),
    ("hisa", {"keep": 9, "block": 4, "blocks": 4, "chunk": 16}),
    ("hisa", {"keep": 9, "block": 4, "blocks": 4, "query_block": 6, "chunk": 16}),
]


def brute_scores(index):
    """I by its formula, one pair at a time."""
    q, k, gates = index.q, index.k, index.gates
    per = q.shape[1] // k.shape[1]
    scores = torch.zeros(q.shape[0], q.shape[2], k.shape[2], dtype=q.dtype)
    for j in range(q.shape[1]):
        inner = torch.einsum("btd,bsd->bts", q[:, j], k[:, j // per]).clamp(min=0)
        scores += inner * (1 if gates is None else gates[:, j, :, None])
    return scores


def brute_top(scores, k, allowed):
    """The k highest allowed places; of equal ones the later."""
    places = sorted(allowed, key=lambda s: (-scores[s].item(), -s))
    return sorted(places[:k])


def sets(selection, b, t):
    return selection.index[b, 0, t][selection.valid[b, 0, t]].tolist()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("gates", [True, False])
def test_flat_indexer_is_the_formula_and_its_causal_top_k(groups, gates):
    index, indexer = index_of(groups=groups, gates=gates), FlatIndexer(7, chunk=16)
    expected = brute_scores(index)
    torch.testing.assert_close(indexer.score(index.q, index.k, index.gates)[:, 0], expected)
    found = indexer.choose(index, query_positions=ARANGE, lengths=torch.tensor([N, 30]))
    for b, t in ((0, 0), (0, 5), (0, 6), (0, 40), (0, N - 1), (1, 29), (1, 50)):
        assert sets(found, b, t) == brute_top(expected[b, t], 7, range(min(t + 1, (N, 30)[b])))


def test_equal_scores_go_to_the_later_key_however_the_keys_are_laid_out():
    scores = torch.tensor([3.0, 0.0, 0.0, 1.0, 0.0, -torch.inf, 0.0])[None, None, None]
    assert sets(top_recent(scores, 4), 0, 0) == [0, 3, 4, 6]
    assert sets(top_recent(scores, 2), 0, 0) == [0, 3]
    assert sets(top_recent(scores, 7), 0, 0) == [0, 1, 2, 3, 4, 6]
    assert sets(top_recent(torch.full((1, 1, 1, 5), -torch.inf), 2), 0, 0) == []
    assert top_recent(scores, 0).index.shape == (1, 1, 1, 0)


# 1, 2, 3: the regimes


@pytest.mark.parametrize("query_block", [1, 5])
@pytest.mark.parametrize("blocks", [17, 18])
def test_1_all_blocks_choose_what_the_flat_indexer_chooses(query_block, blocks):
    """With 17 blocks of 4 keys the last chunk looks beyond the budget, so that both stages choose for its first queries too."""
    index, within = index_of(), min(4 * blocks, N)
    hisa = HisaIndexer(9, block=4, blocks=blocks, query_block=query_block, chunk=10).choose(index, query_positions=ARANGE)
    flat = FlatIndexer(9).choose(index, query_positions=ARANGE)
    assert all(sets(hisa, b, t) == sets(flat, b, t) for b in range(B) for t in range(within))


@pytest.mark.parametrize("lengths", [None, torch.tensor([N, 30])])
def test_1_without_positions_too(lengths):
    index = index_of()
    hisa = HisaIndexer(9, block=4, blocks=18, query_block=5).choose(index, lengths=lengths)
    flat = FlatIndexer(9).choose(index, lengths=lengths)
    assert all(sets(hisa, b, t) == sets(flat, b, t) for b in range(B) for t in range(N))
    beyond = HisaIndexer(9, block=4, blocks=9, query_block=5).choose(index, lengths=lengths)
    assert [sets(beyond, 1, t) == sets(flat, 1, t) for t in range(N)] == [lengths is not None] * N or lengths is None


def test_1_both_stages_agree_with_flat_for_the_queries_within_the_budget_of_a_chunk_beyond_it():
    index = index_of()
    one_chunk = HisaIndexer(9, block=4, blocks=5, chunk=N).choose(index, query_positions=ARANGE)
    flat = FlatIndexer(9).choose(index, query_positions=ARANGE)
    same = [[sets(one_chunk, b, t) == sets(flat, b, t) for t in range(N)] for b in range(B)]
    assert all(all(row[:20]) for row in same) and not all(all(row[20:]) for row in same)


@pytest.mark.parametrize("query_block", [1, 7])
def test_1_ties_behind_the_relu_fall_alike(query_block):
    index = index_of(heads=1, gates=False)
    found = HisaIndexer(48, block=4, blocks=17, query_block=query_block, chunk=N).choose(index, query_positions=ARANGE)
    flat = FlatIndexer(48).choose(index, query_positions=ARANGE)
    assert (brute_scores(index) == 0).double().mean() > 0.4
    assert all(sets(found, b, t) == sets(flat, b, t) for b in range(B) for t in range(68))


@pytest.mark.parametrize("name,config", SMALL)
@pytest.mark.parametrize("positions", [ARANGE, None])
@pytest.mark.parametrize("lengths", [None, torch.tensor([N, 33]), torch.tensor([0, 5])])
def test_2_keeping_all_is_dense(name, config, positions, lengths):
    q, k, v = drawn()
    whole = config | {"keep": N} | ({"blocks": 18} if name == "hisa" else {})
    found = attention(name, **whole)(q, k, v, query_positions=positions, lengths=lengths)
    torch.testing.assert_close(found, dense_attend(q, k, v, query_positions=positions, lengths=lengths), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name,config", SMALL)
def test_2_early_queries_are_dense(name, config):
    q, k, v = drawn()
    found = attention(name, **config)(q, k, v, query_positions=ARANGE)
    dense = dense_attend(q, k, v, query_positions=ARANGE)
    torch.testing.assert_close(found[:, :, :9], dense[:, :, :9], atol=1e-10, rtol=0)
    assert not torch.allclose(found[:, :, 20:], dense[:, :, 20:])


@pytest.mark.parametrize("query_block", [1, 5])
def test_3_exactly_min_k_t_keys_each_once_inside_the_candidates(query_block):
    index = index_of()
    hisa = HisaIndexer(9, block=4, blocks=4, query_block=query_block, chunk=10)
    found = hisa.choose(index, query_positions=ARANGE)
    blocks = hisa.candidates(index, ARANGE)
    assert found.valid.sum(-1)[0, 0].tolist() == [min(9, t + 1) for t in range(N)]
    for b in range(B):
        for t in range(N):
            chosen, where = sets(found, b, t), sets(blocks, b, t // query_block)
            assert chosen == sorted(set(chosen)) and chosen[-1] <= t
            assert {0, t // 4} <= set(where)
            assert {s // 4 for s in chosen} <= set(where)
            leader = t // query_block * query_block
            assert len([x for x in where if x <= leader // 4]) == min(4, leader // 4 + 1)


def test_3_candidates_are_the_blocks_with_the_best_means():
    index = index_of()
    found = HisaIndexer(9, block=4, blocks=4).candidates(index, ARANGE)
    means = index.k[:, :, :68].unflatten(2, (17, 4)).mean(3)
    scores = brute_scores(IndexInputs(index.q, means, index.gates))
    for b in range(B):
        for t in range(N):
            own = t // 4
            assert sets(found, b, t) == sorted({0, own} | set(brute_top(scores[b, t], 2, range(1, own))))


def test_4_the_fine_scores_are_the_flat_ones_bit_for_bit():
    torch.manual_seed(0)
    whole = [torch.randint(-4, 5, s).double() for s in ((1, H, N, D), (1, 1, N, D), (1, H, N))]  # sums of integers have no rounding
    index = IndexInputs(*whole)
    found = HisaIndexer(9, block=4, blocks=4, chunk=N).choose(index, query_positions=ARANGE)
    blocks = HisaIndexer(9, block=4, blocks=4).candidates(index, ARANGE)
    scores = FlatIndexer(9).score(*whole)[0, 0]
    for t in range(N):
        omega = [s for s in range(t + 1) if s // 4 in sets(blocks, 0, t)]
        assert sets(found, 0, t) == brute_top(scores[t], 9, omega)


def test_5_recall_rises_with_the_blocks():
    index = index_of()
    flat = FlatIndexer(9).choose(index, query_positions=ARANGE).mask(N)
    recalls = [
        (HisaIndexer(9, block=4, blocks=m).choose(index, query_positions=ARANGE).mask(N) & flat).sum(-1) for m in (3, 4, 6, 9, 13, 18)
    ]
    assert all(bool((a <= b).all()) for a, b in pairwise(recalls))
    assert bool((recalls[-1] == flat.sum(-1)).all()) and bool((recalls[0] < recalls[-1]).any())


@pytest.mark.parametrize("steps", [[1] * 23, [23], [5, 0, 12, 1, 5], [4, 4, 15]])
def test_6_block_means_grow_to_what_recomputation_gives(steps):
    keys, store = drawn()[1][:, :, :23], BlockMeans(4)
    begin = 0
    for n in steps:
        store.append(keys[:, :, begin : begin + n])
        begin += n
        expected = torch.stack([keys[:, :, i : i + 4].mean(2) for i in range(0, begin - 3, 4)], 2) if begin > 3 else keys[:, :, :0]
        torch.testing.assert_close(store.means, expected)
        assert store.count == begin


def test_6_decoding_with_kept_means_is_the_query_of_the_whole_sequence():
    q, k, v = drawn()
    module = attention("hisa", keep=9, block=4, blocks=4)
    whole = module(q, k, v, query_positions=ARANGE)
    store = BlockMeans.of(k[:, :, :60], 4)
    for t in range(60, N):
        store.append(k[:, :, t : t + 1])
        seen = slice(0, t + 1)
        index = IndexInputs(q[:, :, t : t + 1], k[:, :, seen], None, store)
        step = module(q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen], query_positions=torch.tensor([t]), index=index)
        torch.testing.assert_close(step, whole[:, :, t : t + 1])


@pytest.mark.parametrize("query_block", [1, 4])
def test_7_block_coherent_keys_are_found(query_block):
    torch.manual_seed(0)
    keys, block, queries = 2048, 32, 16
    k = torch.randn(1, 1, keys // block, 32).repeat_interleave(block, 2) + 0.2 * torch.randn(1, 1, keys, 32)
    target = torch.randint(keys // block, (queries // 4,)).repeat_interleave(4) * block  # adjacent queries look for the same
    q = k[:, :, target].expand(-1, 4, -1, -1) + 0.3 * torch.randn(1, 4, queries, 32)
    index, positions = IndexInputs(q, k), torch.arange(keys - queries, keys)
    hisa = HisaIndexer(128, block, 16, query_block).choose(index, query_positions=positions)
    flat = FlatIndexer(128).choose(index, query_positions=positions)
    assert hisa.iou(flat, keys).mean() > 0.99
    noise = IndexInputs(q, torch.randn_like(k))
    assert HisaIndexer(128, block, 16).choose(noise).iou(FlatIndexer(128).choose(noise), keys).mean() < 0.8


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that anything made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, torch.Tensor) and x._base is None and x.untyped_storage().nbytes():
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("query_block", [1, 4])
def test_no_tensor_grows_with_queries_times_keys(query_block):
    largest = []
    for n in (256, 1024):
        q, k, v = drawn(batch=1, keys=n, queries=n, heads=2, groups=1)
        with Largest() as memory:
            attention("hisa", keep=8, block=8, blocks=4, chunk=32, query_block=query_block)(q, k, v, query_positions=torch.arange(n))
        largest.append(memory.elements)
    assert largest[1] <= 4 * largest[0] and largest[1] < 1024 * 1024 / 16


def test_scored_keys_are_the_papers_count():
    paper = HisaIndexer(2048, block=128, blocks=64)
    assert [paper.scored_keys(n) for n in (8192, 32768, 131072)] == [8192, 8448, 9216]
    assert FlatIndexer(2048).scored_keys(32768) == 32768


# what every sparse attention holds


@pytest.mark.parametrize("name,config", SMALL)
def test_no_later_token_has_an_influence(name, config):
    q, k, v = drawn()
    module = attention(name, **config)
    before = module(q, k, v, query_positions=ARANGE)
    for t in (21, 38, 42, 43, 66):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t + 1 :] = 10 * torch.randn_like(x[:, :, t + 1 :])
        torch.testing.assert_close(module(*changed, query_positions=ARANGE)[:, :, : t + 1], before[:, :, : t + 1])


@pytest.mark.parametrize("name,config", SMALL)
@pytest.mark.parametrize("positions", [ARANGE, None])
def test_a_row_does_not_know_its_batch_mates_nor_its_padding(name, config, positions):
    q, k, v = drawn(batch=3)
    lengths = torch.tensor([N, 41, 0])
    module = attention(name, **config)
    together = module(q, k, v, query_positions=positions, lengths=lengths)
    assert bool((together[2] == 0).all())
    for b in (0, 1):
        rows = [x[b : b + 1] for x in (q, k, v)]
        alone = module(*rows, query_positions=positions, lengths=lengths[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone)
        rows[1], rows[2] = rows[1].clone(), rows[2].clone()
        rows[1][:, :, lengths[b] :], rows[2][:, :, lengths[b] :] = 1e3, 1e3
        torch.testing.assert_close(module(*rows, query_positions=positions, lengths=lengths[b : b + 1]), alone)


@pytest.mark.parametrize("name,config", SMALL)
def test_attention_is_softmax_over_the_chosen_keys(name, config):
    q, k, v = drawn()
    module = attention(name, **config)
    mask = module.choose(q, k, ARANGE, None).mask(N)
    expected = scaled_dot_product_attention(
        q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1), attn_mask=mask.expand(-1, H, -1, -1), scale=0.3
    )
    torch.testing.assert_close(module(q, k, v, query_positions=ARANGE, scale=0.3), expected)
    assert torch.equal(module(q, k, v, query_positions=ARANGE), module(q, k, v, query_positions=ARANGE))


@pytest.mark.parametrize("chunk", [1, 7, 64, 500])
def test_chunks_change_nothing(chunk):
    q, k, v = drawn()
    for name, config in SMALL[:2]:
        expected = attention(name, **config)(q, k, v, query_positions=ARANGE)
        torch.testing.assert_close(attention(name, **config | {"chunk": chunk})(q, k, v, query_positions=ARANGE), expected)


@pytest.mark.parametrize("name,config", [("dsa", {"keep": 4, "chunk": 5}), ("hisa", {"keep": 4, "block": 2, "blocks": 3, "chunk": 5})])
def test_gradients_flow_through_what_is_read(name, config):
    q, k, v = drawn(batch=1, keys=11, queries=11, heads=2, groups=1)
    positions, module = torch.arange(11), attention(name, **config)
    inputs = [x[..., :3].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: module(*x, query_positions=positions), inputs, eps=1e-7, atol=1e-5, fast_mode=True)


def test_nothing_to_do_works():
    for name, config in SMALL:
        q, k, v = drawn()
        assert attention(name, **config)(q[:, :, :0], k, v).shape == (B, H, 0, D)
        assert attention(name, **config)(q[:0], k[:0], v[:0]).shape == (0, H, N, D)


def test_short_inputs_are_dense():
    q, k, v = drawn()
    short = HisaAttention(HisaAttention.Config(min_length=N, keep=1, block=1, blocks=2))
    torch.testing.assert_close(short(q, k, v, query_positions=ARANGE), dense_attend(q, k, v, query_positions=ARANGE))


# the trained indexer


def test_a_trained_index_is_what_chooses():
    q, k, v = drawn()
    torch.manual_seed(3)
    index = IndexerProjection(16, heads=3, dim=5).double()(torch.randn(B, N, 16, dtype=torch.float64))
    assert index.q.shape == (B, 3, N, 5) and index.k.shape == (B, 1, N, 5) and index.gates.shape == (B, 3, N)
    module = attention("hisa", keep=9, block=4, blocks=4)
    mask = module.indexer.choose(index, query_positions=ARANGE).mask(N)
    expected = scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=mask.expand(-1, H, -1, -1))
    torch.testing.assert_close(module(q, k, v, query_positions=ARANGE, index=index), expected)
    assert not torch.allclose(module(q, k, v, query_positions=ARANGE), expected)


def test_projection_norms_its_keys_and_scales_its_gates():
    torch.manual_seed(0)
    module, x = IndexerProjection(16, heads=3, dim=5).double(), torch.randn(B, N, 16, dtype=torch.float64)
    index = module(x)
    torch.testing.assert_close(index.k.mean(-1), torch.zeros(B, 1, N, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(index.gates, (x @ module.gate.weight.T).transpose(1, 2) * 3**-0.5 * 5**-0.5)


def test_loss_is_the_divergence_of_the_scores_softmax_from_the_summed_attention():
    torch.manual_seed(0)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    scores = torch.randn(B, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(B, H, 6, 6, dtype=torch.float64, requires_grad=True)
    attended = weights.masked_fill(~allowed, -torch.inf).softmax(-1)
    rows = []
    for b in range(B):
        for t in range(6):
            p = attended[b, :, t, : t + 1].sum(0) / attended[b, :, t, : t + 1].sum()
            rows.append(kl_div(scores[b, 0, t, : t + 1].log_softmax(-1), p, reduction="sum"))
    loss = indexer_loss(scores, attended, allowed)
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    loss.backward()
    assert weights.grad is None and bool((scores.grad.masked_select(~allowed.expand_as(scores)) == 0).all())
    exact = attended.detach().sum(1, keepdim=True).clamp(min=1e-300).log()
    torch.testing.assert_close(indexer_loss(exact, attended, allowed), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    none = indexer_loss(scores, attended, torch.zeros_like(allowed))
    assert none == 0 and bool(torch.autograd.grad(none, scores)[0].isfinite().all())


def test_gradients_of_the_loss_are_right():
    torch.manual_seed(0)
    scores = torch.randn(1, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    attended = torch.rand(1, 2, 4, 5, dtype=torch.float64)
    allowed = torch.rand(1, 1, 4, 5) > 0.4
    allowed[0, 0, 2] = False
    assert torch.autograd.gradcheck(lambda s: indexer_loss(s, attended, allowed), (scores,))


def test_training_brings_the_index_to_the_attention():
    torch.manual_seed(0)
    x, allowed = torch.randn(4, 24, 16), torch.ones(24, 24, dtype=torch.bool).tril()
    teacher = (x @ torch.randn(16, 16) @ x.transpose(1, 2) / 16).masked_fill(~allowed, -torch.inf).softmax(-1)[:, None]
    module, flat = IndexerProjection(16, heads=8, dim=16), FlatIndexer(6)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)

    def recall():
        return flat.choose(module(x), query_positions=torch.arange(24)).recall(teacher)[:, :, 12:].mean()

    before = recall()
    for _ in range(60):
        index = module(x)
        optimizer.zero_grad()
        indexer_loss(flat.score(index.q, index.k, index.gates), teacher, allowed).backward()
        optimizer.step()
    assert recall() > before + 0.15


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="4 x 2 < 9"):
        HisaIndexer(9, block=2, blocks=4)
    with pytest.raises(ConfigError, match="blocks of at least 2"):
        HisaIndexer(1, block=2, blocks=1)
    with pytest.raises(ConfigError, match="keep"):
        FlatIndexer(0)
    q, k, v = drawn()
    with pytest.raises(ConfigError, match="G dividing"):
        IndexInputs(q[:, :3], k)
    with pytest.raises(ConfigError, match="gates"):
        IndexInputs(q, k, torch.ones(B, H, 3))
    with pytest.raises(ConfigError, match="means"):
        IndexInputs(q, k, None, BlockMeans.of(k[:, :, 1:], 4))
    with pytest.raises(ConfigError, match="blocks of 4 keys, got 8"):
        HisaIndexer(9, 4, 4).choose(IndexInputs(q, k, None, BlockMeans.of(k, 8)))
    with pytest.raises(ConfigError, match="index: expected that of"):
        attention("dsa")(q, k, v, index=IndexInputs(q[:, :, :3], k))
