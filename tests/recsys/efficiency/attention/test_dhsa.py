# SPDX-License-Identifier: Apache-2.0
"""DHSA: the properties of the specification, its boundaries, and what every sparse attention holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.components import get
from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.attend import dense_attend, sparse_attend
from recsys.efficiency.attention import blocks as blocks_module
from recsys.efficiency.attention.boundaries import (
    BoundaryPredictor,
    best_gaps,
    boundary_ratios,
    boundary_targets,
    focal_loss,
    spaced,
)
from recsys.efficiency.attention.dhsa import DHSA, Chunks, begins_of
from recsys.efficiency.cost import Cost

B, H, G, N, D = 2, 4, 2, 70, 8
PLACE = torch.arange(N)


def drawn(seed=0, batch=B, keys=N, queries=None, groups=G):
    torch.manual_seed(seed)
    shapes = (batch, H, keys if queries is None else queries, D), (batch, groups, keys, D), (batch, groups, keys, D)
    return tuple(torch.randn(*s, dtype=torch.float64) for s in shapes)


def attention(predictor=None, **config):
    small = {"min_length": 0, "budget": 24, "query_block": 8, "chunk_size": 5, "n_local": 3, "n_global": 2}
    torch.manual_seed(1)
    return DHSA(DHSA.Config(**{**small, **config}, predictor=predictor)).double()


LEARNED = BoundaryPredictor.Config(width=G * D, window=3, hidden=8, separation=2, threshold=0.45, chunks_per_block=2.0)
FORMS = [{}, {"per_key_head": True}, {"predictor": LEARNED}, {"block_query": "mean"}, {"n_local": 0, "n_global": 0, "chunk_size": 1}]
STRICT = [form for form in FORMS if form.get("block_query") != "mean"]


def random_begins(seed, batch=B, keys=N, share=0.2):
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) < share


def brute_choice(q, k, begins, config, length, causal=True):
    """The keys each block of one row reads, by token scores and a stable sort: [block][group] -> sorted list."""
    starts = sorted({0, *(i for i in range(length) if begins[i])})
    found = []
    for p in range(0, q.shape[1], config.query_block):
        real = min(p + config.query_block, length)
        query = q[:, p] if causal and config.block_query == "first" else q[:, p:real].sum(1) / max(real - p, 1) ** 0.5
        query = query.unflatten(0, (k.shape[0], -1)).sum(1)
        before, most = (min(p, length), config.budget - config.query_block) if causal else (length, config.budget)
        ends = [*starts[1:], length]
        scores = torch.zeros(k.shape[0], before, dtype=k.dtype)
        for start, end in zip(starts, ends, strict=True):
            end = min(end, before)
            if start < end:
                scores[:, start:end] = ((k[:, start:end].sum(1) / (end - start) ** 0.5) * query).sum(-1, keepdim=True)
        scores = scores if config.per_key_head else scores.mean(0, keepdim=True)
        scores[:, : config.n_global] = scores[:, max(before - config.n_local, 0) :] = torch.inf
        order = [sorted(range(before), key=lambda s, row=row: (-row[s], -s))[:most] for row in scores.tolist()]
        own = list(range(p, min(p + config.query_block, length))) if causal else []
        found.append([sorted(row + own) for row in order])
    return found


def sets(selection, b):
    shape = selection.index.shape
    return [[selection.index[b, g, i][selection.valid[b, g, i]].tolist() for g in range(shape[1])] for i in range(shape[2])]


@pytest.mark.parametrize("form", [{}, {"per_key_head": True}, {"block_query": "mean"}, {"n_local": 0, "n_global": 0}, {"n_local": 14}])
@pytest.mark.parametrize("causal", [True, False])
def test_chooses_the_top_tokens_by_brute_force(form, causal):
    q, k, _ = drawn(batch=3)
    layer, begins, lengths = attention(**form), random_begins(2, 3), torch.tensor([70, 41, 8])
    chosen = layer.choose(q, k, PLACE if causal else None, lengths, begins)
    for b, length in enumerate(lengths.tolist()):
        real = -(-length // 8)  # blocks of padding read what they may
        assert sets(chosen, b)[:real] == brute_choice(q[b], k[b], begins[b], layer.config, length, causal)[:real]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_result_is_exact_attention_to_what_was_chosen(form, causal, monkeypatch):
    q, k, v = drawn(batch=3)
    layer, places = attention(**form), PLACE if causal else None
    for lengths in (None, torch.tensor([70, 41, 0])):
        chosen = layer.choose(q, k, places, lengths)
        exact = sparse_attend(q, k, v, chosen, query_positions=places)
        for most in (1 << 22, 1):
            monkeypatch.setattr(blocks_module, "_GATHERED", most)
            monkeypatch.setattr(blocks_module, "_SCORED", most)
            found = layer(q, k, v, query_positions=places, lengths=lengths)
            torch.testing.assert_close(found, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [70, 33], [0, 1]])
def test_budget_of_everything_is_dense(causal, lengths):
    q, k, v = drawn()
    lengths = None if lengths is None else torch.tensor(lengths)
    places = PLACE if causal else None
    dense = dense_attend(q, k, v, query_positions=places, lengths=lengths)
    for form in FORMS:
        found = attention(**{**form, "budget": 72})(q, k, v, query_positions=places, lengths=lengths)
        torch.testing.assert_close(found, dense, atol=1e-10, rtol=0)


def test_one_chunk_for_each_token_is_top_k_of_the_product_with_the_block_query():
    q, k, _ = drawn()
    layer = attention(n_local=0, n_global=0, block_query="mean")
    chosen = layer.choose(q, k, PLACE, None, torch.ones(B, N, dtype=torch.bool))
    for p in range(24, N - 8, 8):
        scores = torch.einsum("bhqe,bhse->bs", q[:, :, p : p + 8], k[:, :, :p].repeat_interleave(2, 1))
        best = scores.topk(16).indices.sort(-1).values
        assert torch.equal(chosen.index[:, 0, p // 8, :16].long(), best)


def test_one_chunk_is_recency():
    q, k, _ = drawn()
    chosen = attention().choose(q, k, PLACE, None, torch.zeros(B, N, dtype=torch.bool))
    for p in range(24, N - 8, 8):
        assert sets(chosen, 0)[p // 8] == [[0, 1, *range(p - 14, p + 8)]]


def test_of_equal_chunks_the_later_is_read():
    q, k, _ = drawn()
    chosen = attention(chunk_size=4).choose(q, torch.zeros_like(k), PLACE, None)
    for p in range(24, N - 8, 8):
        assert sets(chosen, 0)[p // 8] == [[0, 1, *range(p - 14, p + 8)]]


def test_vectors_by_prefix_sums_are_the_direct_ones():
    _, k, _ = drawn(keys=2000)
    begins = random_begins(3, keys=2000, share=0.05)
    chunks = Chunks.of(k, begins, None, 128)
    for b in range(B):
        starts = [s for s in chunks.starts[b].tolist() if s < 2000]
        ends = [*starts[1:], 2000]
        direct = torch.stack([k[b, :, s:e].sum(1) / (e - s) ** 0.5 for s, e in zip(starts, ends, strict=True)], 1)
        found = chunks.vectors(torch.tensor([starts]).expand(B, -1), torch.tensor([ends]).expand(B, -1))[b]
        torch.testing.assert_close(found, direct, atol=1e-12, rtol=0)


def test_variance_of_a_score_does_not_depend_on_the_chunks_length():
    torch.manual_seed(0)
    k = torch.randn(1, 1, 64 * 2000, 4, dtype=torch.float64)
    query = torch.randn(4, dtype=torch.float64)
    for size in (1, 4, 16, 64):
        starts = torch.arange(0, 64 * 2000, size)[None, -2000:]
        chunks = Chunks.of(k, torch.zeros(1, k.shape[2], dtype=torch.bool), None, size)
        variance = (chunks.vectors(starts, starts + size) @ query).var() / query.square().sum()
        assert 0.85 < variance < 1.15


def test_equal_chunks_rank_as_means_do():
    q, k, _ = drawn(groups=1)
    layer = attention(n_local=0, n_global=0, chunk_size=8, budget=24)
    chosen = layer.choose(q, k, PLACE, None)
    for i in range(3, N // 8):
        means = k[:, 0, : 8 * i].unflatten(1, (i, 8)).mean(2)
        best = (means @ q[:, :, 8 * i].sum(1)[..., None])[..., 0].topk(2).indices.sort(-1).values
        expected = (best[..., None] * 8 + torch.arange(8)).flatten(1)
        assert torch.equal(chosen.index[:, 0, i, :16].long(), expected)


@pytest.mark.parametrize("form", STRICT)
def test_nothing_behind_a_query_has_a_say(form):
    q, k, v = drawn()
    layer, begins = attention(**form), None if "predictor" in form else random_begins(5)
    found = layer(q, k, v, query_positions=PLACE, boundaries=begins)
    for t in (0, 23, 31, 32, 37, 50, 68):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, t + 1 :] = 4 * torch.randn(x[:, :, t + 1 :].shape, dtype=x.dtype)
        changed = None if begins is None else torch.where(t < PLACE, ~begins, begins)
        again = layer(*others, query_positions=PLACE, boundaries=changed)
        torch.testing.assert_close(again[:, :, : t + 1], found[:, :, : t + 1], atol=1e-10, rtol=0)
        shorter = layer(
            *(x[:, :, : t + 1] for x in (q, k, v)),
            query_positions=PLACE[: t + 1],
            boundaries=None if begins is None else begins[:, : t + 1],
        )
        torch.testing.assert_close(shorter, found[:, :, : t + 1], atol=1e-10, rtol=0)


def test_a_learned_boundary_counts_once_its_keys_are_there():
    for threshold in (0.0, 0.4, 0.45, 0.5):
        config = LEARNED.model_copy(update={"threshold": threshold, "separation": 1})
        layer = attention(predictor=config, n_local=0, n_global=0)
        for seed in range(5):
            q, k, _ = drawn(seed)
            chosen = layer.choose(q, k, PLACE, None).mask(N)
            for p in range(24, N, 8):
                later = k.clone()
                later[:, :, p:] = torch.randn(later[:, :, p:].shape, dtype=k.dtype) * 3
                assert torch.equal(layer.choose(q, later, PLACE, None).mask(N)[:, :, p // 8], chosen[:, :, p // 8])


def test_the_papers_block_mean_leaks_within_a_block_only():
    leaks = 0
    for seed in range(10):
        q, k, v = drawn(seed)
        layer = attention(block_query="mean")
        found = layer(q, k, v, query_positions=PLACE)
        q[:, :, 47] = 9 * torch.randn(B, H, D, dtype=q.dtype)
        again = layer(q, k, v, query_positions=PLACE)
        torch.testing.assert_close(again[:, :, :40], found[:, :, :40], atol=1e-10, rtol=0)
        leaks += not torch.allclose(again[:, :, 40:47], found[:, :, 40:47])
    assert leaks


def test_reads_the_budget_with_forced_tokens_and_no_duplicates():
    q, k, _ = drawn()
    for form in FORMS:
        layer = attention(**form)
        for i, groups in enumerate(sets(layer.choose(q, k, PLACE, None), 0)):
            own = range(8 * i, min(8 * i + 8, N))
            for keys in groups:
                assert keys == sorted(set(keys)) and len(keys) == min(16, 8 * i) + len(own)
                forced = set(range(min(layer.config.n_global, 8 * i))) | set(range(max(8 * i - layer.config.n_local, 0), 8 * i))
                assert forced | set(own) <= set(keys)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_do_not_depend_on_their_mates(form, causal):
    q, k, v = drawn(batch=4)
    lengths, layer = torch.tensor([70, 45, 27, 0]), attention(**form)
    found = layer(q, k, v, query_positions=PLACE if causal else None, lengths=lengths)
    assert not found[3].any()
    for b, length in enumerate(lengths.tolist()[:3]):
        alone = layer(*(x[b : b + 1, :, :length] for x in (q, k, v)), query_positions=PLACE[:length] if causal else None)
        torch.testing.assert_close(found[b : b + 1, :, :length], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", STRICT)
def test_a_prompt_in_parts_is_read_as_the_whole(form):
    q, k, v = drawn()
    layer = attention(**form)
    whole = layer(q, k, v, query_positions=PLACE)
    for begin, end in ((0, 40), (40, 64), (48, 49), (64, 70)):
        part = layer(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], query_positions=PLACE[begin:end])
        torch.testing.assert_close(part, whole[:, :, begin:end], atol=1e-10, rtol=0)


@pytest.mark.parametrize("places", [[69], [60, 61, 62], [37, 38, 39, 40, 41, 42], [3, 30, 31, 69], [50, 50, 66]])
def test_queries_at_other_places(places):
    q, k, v = drawn(queries=len(places))
    places = torch.tensor(places)
    lengths = torch.tensor([70, 33])
    full = attention(budget=80)(q, k, v, query_positions=places, lengths=lengths)
    torch.testing.assert_close(full, dense_attend(q, k, v, query_positions=places, lengths=lengths), atol=1e-10, rtol=0)
    short = attention()(q, k, v, query_positions=places, lengths=lengths)
    far, values = k.clone(), v.clone()
    far[1, :, 33:], values[1, :, 33:] = 2.0, -2.0
    torch.testing.assert_close(attention()(q, far, values, query_positions=places, lengths=lengths), short, atol=1e-10, rtol=0)
    found = attention()(q, k, v, query_positions=places)
    k[:, :, int(places[0]) + 1 :], v[:, :, int(places[0]) + 1 :] = 3.0, -3.0
    torch.testing.assert_close(attention()(q, k, v, query_positions=places)[:, :, 0], found[:, :, 0], atol=1e-10, rtol=0)


def test_instruction_tokens_read_everything():
    q, k, v = drawn(batch=3)
    lengths, layer = torch.tensor([70, 45, 2]), attention(instruction_tokens=5)
    found, plain = (x(q, k, v, query_positions=PLACE, lengths=lengths) for x in (layer, attention()))
    dense = dense_attend(q, k, v, query_positions=PLACE, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        last = slice(max(length - 5, 0), length)
        torch.testing.assert_close(found[b, :, last], dense[b, :, last], atol=1e-10, rtol=0)
        torch.testing.assert_close(found[b, :, : last.start], plain[b, :, : last.start], atol=1e-10, rtol=0)
    assert not torch.allclose(plain[0, :, -5:], dense[0, :, -5:])


def test_given_boundaries():
    jagged = (torch.tensor([0, 9, 30, 4]), torch.tensor([0, 3, 4]))
    begins = torch.zeros(B, N, dtype=torch.bool)
    begins[0, [0, 9, 30]] = begins[1, 4] = True
    assert torch.equal(begins_of(jagged, B, N), begins)
    q, k, v = drawn()
    layer = attention()
    found = layer(q, k, v, query_positions=PLACE, boundaries=jagged)
    assert torch.equal(found, layer(q, k, v, query_positions=PLACE, boundaries=begins))
    assert not torch.allclose(found, layer(q, k, v, query_positions=PLACE))
    for wrong in (begins.long(), begins[:1], (jagged[0], jagged[1][:2]), (torch.tensor([N]), torch.tensor([0, 1, 1]))):
        with pytest.raises(DataError, match="boundaries"):
            layer(q, k, v, query_positions=PLACE, boundaries=wrong)


def test_work_is_the_budget():
    q, k, v = drawn(batch=1, keys=256)
    layer = attention(budget=64, query_block=16, chunk_size=8)
    with Cost() as cost:
        layer(q, k, v, query_positions=torch.arange(256))
    early, late = 64 * 65 // 2, (256 - 64) * 64
    scores = (256 - 64) // 16 * (256 // 8) * G * D
    assert cost.macs == 2 * H * D * (early + late) + scores


def test_finds_planted_segments_better_than_fixed_chunks():
    def recall(begins):
        q, k, _ = drawn(seed=4, batch=8, keys=512, groups=4)
        lengths = torch.randint(3, 40, (8, 100), generator=torch.Generator().manual_seed(0)).cumsum(1)
        true = torch.zeros(8, 513, dtype=torch.bool).scatter(1, lengths.clamp(max=512), True)[:, :512]
        segment = true.long().cumsum(1)
        topics = torch.randn(8, 4, 100, D, dtype=torch.float64)
        k = 0.5 * k + topics.gather(2, segment[:, None, :, None].expand(-1, 4, -1, D)) * 2
        q = 2 * k[:, :, torch.randperm(512, generator=torch.Generator().manual_seed(1))]
        q = q[:, :, ::8].repeat_interleave(8, 2)  # a block asks for one segment
        layer = attention(budget=72, chunk_size=16, n_local=0, n_global=0)
        chosen = layer.choose(q, k, torch.arange(512), None, true if begins else None)
        weights = (q @ k.transpose(2, 3) / D**0.5).masked_fill(torch.arange(512) > torch.arange(512)[:, None], -torch.inf).softmax(-1)
        return chosen.recall(weights.mean(1).unflatten(1, (64, 8)).sum(2)[:, None])[..., 16:].mean()

    assert recall(True) > recall(False) + 0.02


def test_gradients():
    q, k, v = drawn(batch=1, keys=30)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    layer = attention(n_local=1, n_global=1, budget=12, query_block=4)
    for places, lengths in ((PLACE[:30], None), (None, None), (PLACE[:30], torch.tensor([19]))):
        assert torch.autograd.gradcheck(lambda *x, p=places, n=lengths: layer(*x, query_positions=p, lengths=n), leaves, fast_mode=True)


def test_teacher_ratios_by_hand():
    torch.manual_seed(0)
    attention_map = torch.rand(2, 20, 20, dtype=torch.float64).tril()
    found = boundary_ratios(attention_map, 3, 1e-6)
    for i in range(19):
        past = attention_map[:, i + 4 :, max(i - 2, 0) : i + 1].sum((1, 2))
        future = attention_map[:, i + 4 :, i + 1 : i + 4].sum((1, 2))
        expected = (torch.maximum(past, future) + 1e-6) / (torch.minimum(past, future) + 1e-6)
        torch.testing.assert_close(found[:, i], expected, atol=1e-7, rtol=1e-7)
    assert (found >= 1).all()
    with pytest.raises(DataError, match="attention"):
        boundary_ratios(attention_map[0], 3)


def test_targets_and_loss():
    targets = boundary_targets(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(targets, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))  # (r / 2)² / (1 + (r / 2)²)
    logits = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    p = logits.detach().sigmoid()
    hard = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    expected = (1.3 * (1 - p[0, 0]) ** 2 * -p[0, 0].log() + p[0, 1] ** 2 * -(1 - p[0, 1]).log()) / 2
    torch.testing.assert_close(focal_loss(logits, hard), expected)
    assert focal_loss(logits, hard, torch.zeros(1, 2, dtype=torch.bool)) == 0
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, targets[None, :2]), logits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30), st.integers(0, 4), st.integers(0, 9))
def test_picks_are_the_greedy_ones(gaps, separation, most):
    scores = torch.tensor([[float(s) for s, _ in gaps]]).view(1, -1)
    open_ = torch.tensor([[o for _, o in gaps]], dtype=torch.bool).view(1, -1)
    left, right = [], []
    for i in range(len(gaps)):
        if gaps[i][1] and (not left or i - left[-1] > separation):
            left.append(i)
    for i in sorted(range(len(gaps)), key=lambda i: (-gaps[i][0], -i)):
        if gaps[i][1] and len(right) < most and all(abs(i - j) > separation for j in right):
            right.append(i)
    assert spaced(open_, separation).nonzero()[:, 1].tolist() == left
    assert best_gaps(scores, open_, separation, torch.tensor([most])).nonzero()[:, 1].tolist() == sorted(right)


@pytest.mark.parametrize("encoder", ["attention", "conv"])
def test_predictor_reads_its_window_alone(encoder):
    _, k, _ = drawn()
    torch.manual_seed(0)
    predictor = BoundaryPredictor(LEARNED.model_copy(update={"encoder": encoder})).double()
    logits = predictor(k)
    assert logits.shape == (B, N - 1)
    later = k.clone()
    later[:, :, 40] += 1.0
    changed = (predictor(later) != logits).any(0).nonzero()[:, 0].tolist()
    assert changed == list(range(37, 43))  # gaps 40 - window to 40 + window - 1
    padded = torch.nn.functional.pad(k, (0, 0, 0, 5), value=7.0)
    torch.testing.assert_close(predictor(padded, torch.tensor([N, N]))[:, : N - 1], logits, atol=1e-12, rtol=0)


def test_predictor_learns_where_topics_change():
    torch.manual_seed(0)
    topics = torch.randn(40, 1, 4, 8).repeat_interleave(16, 2)
    k = topics + 0.1 * torch.randn(40, 1, 64, 8)
    targets = torch.zeros(40, 63)
    targets[:, [15, 31, 47]] = 1.0
    predictor = BoundaryPredictor(BoundaryPredictor.Config(width=8, hidden=16, threshold=0.0))
    optimizer = torch.optim.Adam(predictor.parameters(), 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        focal_loss(predictor(k[:32]), targets[:32], positive=10.0).backward()
        optimizer.step()
    begins = predictor.begins(k[32:], None, 32, causal=False)
    assert (begins.sum(1) == 4).all() and begins[:, 0].all()  # 2 chunks for each of 2 blocks
    assert begins[:, [16, 32, 48]].double().mean() > 0.8


def test_configuration():
    assert get("sparse_attention", "dhsa") is DHSA
    with pytest.raises(ValueError, match="budget"):
        DHSA.Config(budget=300)
    with pytest.raises(ConfigError, match="heads"):
        BoundaryPredictor(BoundaryPredictor.Config(width=7, heads=2))
    q, k, v = drawn()
    with pytest.raises(ConfigError, match="width"):
        attention(predictor=BoundaryPredictor.Config(width=5))(q, k, v, query_positions=PLACE)
    layer = attention(predictor=LEARNED)
    assert torch.equal(layer(q, k, v, query_positions=PLACE), layer(q, k, v, query_positions=PLACE))
    assert layer(q[:, :, :0], k, v, query_positions=PLACE[:0]).shape == (B, H, 0, D)
