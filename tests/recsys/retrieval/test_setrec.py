# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from recsys.core.components import get
from recsys.core.config import parse
from recsys.core.errors import CannotScoreNewItems, ConfigError, DataError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SASRec, SETRec
from recsys.retrieval.models.setrec import alignment
from tests.recsys.retrieval.coded import batch_of

N, COLD, D_TEXT, D_CF = 12, (3, 11), 7, 5
HISTORIES = [[1, 2, 4], [], [5, 6, 7, 8, 9, 10], [5]]  # item 5 twice: it is reconstructed once
TARGETS = [(0, 0, 1), (0, 2, 4), (0, 2, 5), (2, 5, 10), (2, 5, 10), (1, 0, 6), (3, 1, 8)]


def item_table(count=N, seed=0):
    """Items 0 to N - 1, all but two warm, and after them cold ones; a larger table begins with the smaller one."""
    warm = torch.arange(count) < N
    warm[list(COLD)] = False
    features = torch.randn(2 * N, D_TEXT + D_CF, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[:count]
    return ItemTable(count, warm, features[:, :D_TEXT], features[:, D_TEXT:])


def build(seed=0, items=None, **config):
    torch.manual_seed(seed)
    config = {"dim": 8, "max_length": 6, "dropout": 0.0, "init_std": 0.5, "semantic_tokens": 3, "ae_hidden": (6, 4), **config}
    return SETRec(SETRec.Config(**config), items or item_table()).double()


def outputs(model, history):
    """The n query outputs after a history, without slot weights."""
    return (model.encode(batch_of([history])).values / model.slot_weights()[:, None])[0]


def set_outputs(model, tokens_lnd, queries=None):
    seen = torch.tensor([[len(tokens_lnd)]])
    return model.transformer(tokens_lnd[None], model.queries if queries is None else queries, seen)[0, 0]


def tokens_of(model, rows):
    return model.tokenize(model.content, model.collaborative)[rows]


def test_is_registered_and_configured_by_name():
    assert get("retriever", "setrec") is SETRec
    with pytest.raises(ConfigError, match="beta"):
        parse(SETRec.Config, {"beta": 1.5}, source="recipe.yaml")


# The paper's testable properties, in the order of our notes.


def test_permuting_the_tokens_inside_items_changes_no_query():
    model = build()
    tokens = tokens_of(model, [1, 2, 4, 5])
    shuffled = torch.stack([item[torch.randperm(4)] for item in tokens])
    assert not torch.equal(tokens, shuffled)
    torch.testing.assert_close(set_outputs(model, tokens), set_outputs(model, shuffled))


def test_tokens_of_one_item_do_not_see_each_other_and_later_items_see_them():
    # The item stream leaves the model through the queries only, so hooks look at what enters the second and third block.
    model = build(blocks=3)
    hidden = []
    for block in model.transformer.blocks[1:]:
        block.attention_norm.register_forward_pre_hook(lambda _, x: hidden.append(x[0].detach()))

    def memories(tokens):
        hidden.clear()
        set_outputs(model, tokens)
        return [h[:12].unflatten(0, (3, 4)) for h in hidden]  # the queries come after the items

    tokens = tokens_of(model, [1, 2, 4])
    changed = tokens.clone()
    changed[1, 2] += torch.randn(8)
    before, after = memories(tokens), memories(changed)
    assert len(before) == 2
    for a, b in zip(before, after, strict=True):
        moved = (a - b).abs().amax(-1) > 1e-9
        assert moved.tolist() == [[False] * 4, [False, False, True, False], [True] * 4]


def test_queries_do_not_see_each_other():
    model = build()
    tokens = tokens_of(model, [1, 2, 4])
    queries = model.queries.detach().clone()
    queries[2] += torch.randn(8)
    moved = (set_outputs(model, tokens) - set_outputs(model, tokens, queries)).abs().amax(-1)
    assert moved[2] > 1e-3
    assert moved[[0, 1, 3]].max() == 0


def test_a_row_does_not_depend_on_its_batch_mates():
    model = build()
    together = model.encode(batch_of(HISTORIES)).values
    torch.testing.assert_close(together, torch.cat([model.encode(batch_of([h])).values for h in HISTORIES]))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_one_inner_product_is_the_weighted_sum_of_the_slots(beta):
    model = build(beta=beta)
    weights = [1 - beta, beta, beta, beta]
    queries = torch.stack([outputs(build(beta=0.5), h) for h in HISTORIES])
    tokens = tokens_of(model, slice(None))
    expected = sum(w * torch.einsum("bd,nd->bn", queries[:, k], tokens[:, k]) for k, w in enumerate(weights))
    scores = model.encode(batch_of(HISTORIES)).flat() @ model.item_vectors().T
    torch.testing.assert_close(scores, expected)
    assert torch.equal(scores.topk(5).indices, expected.topk(5).indices)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_compressed_vectors_give_the_same_scores(beta):
    plain, compressed = build(beta=beta), build(beta=beta, compress=True)
    with torch.no_grad():
        for model in (plain, compressed):  # biases are zero at first, and would hide a constant that is missing
            torch.manual_seed(7)
            for bias in (model.collaborative_token.bias, model.semantic.encoder[-1].bias):
                bias.copy_(torch.randn_like(bias))
    scores = [model.encode(batch_of(HISTORIES)).flat() @ model.item_vectors().T for model in (plain, compressed)]
    assert compressed.item_vectors().shape == (N, D_CF + 4 + 1) and plain.item_vectors().shape == (N, 4 * 8)
    torch.testing.assert_close(scores[1], scores[0], atol=1e-12, rtol=1e-12)


def test_beta_one_ignores_the_collaborative_slot_and_beta_zero_the_semantic_ones():
    model = build()
    other = item_table(seed=1)
    for beta, kept in ((1.0, "text"), (0.0, "collaborative")):
        model.set_beta(beta)
        state = model.encode(batch_of([[1, 2]])).flat()
        scores = state @ model.item_vectors().T
        table = model.tokenize(*(getattr(item_table() if kept == name else other, name) for name in ("text", "collaborative")))
        changed = state @ table.flatten(1).T
        torch.testing.assert_close(scores[:, model.warm], changed[:, model.warm])


def test_scaling_the_weights_leaves_the_ranking():
    model = build()
    state, vectors = model.encode(batch_of([[1, 2]])).flat(), model.item_vectors()
    assert torch.equal((state @ vectors.T).argsort(), (7 * state @ vectors.T).argsort())


def test_beta_moves_the_query_and_never_an_item():
    model = build()
    before, vectors = model.encode(batch_of(HISTORIES)).values, model.item_vectors()
    model.set_beta(0.9)
    after = model.encode(batch_of(HISTORIES)).values
    assert torch.equal(model.item_vectors(), vectors)
    torch.testing.assert_close(after[:, 0], before[:, 0] * (0.1 / 0.5))
    torch.testing.assert_close(after[:, 1:], before[:, 1:] * (0.9 / 0.5))
    with pytest.raises(ConfigError, match=r"beta: expected 0 to 1, got -0\.1"):
        model.set_beta(-0.1)


def test_appending_items_changes_no_other_score_and_scores_the_new_ones():
    model = build()
    state = model.encode(batch_of(HISTORIES)).flat()
    before = state @ model.item_vectors().T
    model.replace_items(item_table(N + 4))
    assert torch.equal(model.encode(batch_of(HISTORIES)).flat(), state)
    after = state @ model.item_vectors().T
    torch.testing.assert_close(after[:, :N], before)
    assert after[:, N:].isfinite().all()
    assert after[0, N:].unique().numel() == 4
    assert model.scorable.tolist() == [True] * (N + 4)
    model.encode(batch_of([[N + 3]]))


def test_cold_items_have_one_collaborative_term_for_all():
    model = build()
    query = outputs(model, [1, 2])[0]
    terms = tokens_of(model, list(COLD))[:, 0] @ query
    bias = model.collaborative_token.bias @ query
    torch.testing.assert_close(terms, bias.expand(2))


def loss_by_brute_force(model, candidates, targets):
    rows = candidates.nonzero()[:, 0]
    tokens, losses = tokens_of(model, slice(None)), []
    for row, position, target in targets:
        states = outputs(model, HISTORIES[row][:position])
        index = (rows == target).long().argmax()
        losses += [F.cross_entropy(states[k] @ tokens[rows, k].T, index) for k in range(model.slots)]
    seen = sorted({i for h in HISTORIES for i in h})
    rebuilt = model.semantic.reconstruct(model.semantic(model.content[seen]))
    return torch.stack(losses).mean(), ((rebuilt - model.content[seen]) ** 2).mean()


@pytest.mark.parametrize("cold_in_softmax", [False, True])
def test_loss_is_the_mean_of_slot_losses_of_single_prefixes_plus_alpha_times_the_reconstruction(cold_in_softmax):
    model = build(cold_in_softmax=cold_in_softmax, reconstruction_weight=0.3)
    candidates = torch.ones(N, dtype=torch.bool) if cold_in_softmax else model.warm
    targets = [*TARGETS, (0, 3, 11)]
    cross_entropy, mse = loss_by_brute_force(model, candidates, targets if cold_in_softmax else TARGETS)
    loss, parts = model.loss(batch_of(HISTORIES, targets))
    torch.testing.assert_close(parts["cross_entropy"], cross_entropy.detach())
    torch.testing.assert_close(parts["reconstruction"], mse.detach())
    torch.testing.assert_close(loss, cross_entropy + 0.3 * mse)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    theirs = torch.autograd.grad(cross_entropy + 0.3 * mse, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_one_pass_over_all_prefixes_equals_one_prefix_at_a_time_in_float32():
    model = build(dim=16, init_std=0.1).float()
    history = HISTORIES[2]
    tokens = model.tokenize(model.content, model.collaborative)[history][None]
    together = model.transformer(tokens, model.queries, torch.arange(7)[None])[0]
    for position in range(7):
        torch.testing.assert_close(together[position], outputs(model, history[:position]), rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter_and_no_feature():
    model = build()
    model.loss(batch_of(HISTORIES, TARGETS))[0].backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("key_value.bias"))
    assert not model.collaborative.requires_grad and not model.content.requires_grad
    assert {"collaborative", "text", "warm"} <= dict(model.named_buffers()).keys()


def test_cold_items_outside_the_softmax_are_not_pushed_down():
    model = build()
    tokens = tokens_of(model, slice(None)).detach().requires_grad_()
    model.tokenize = lambda *_: tokens
    model.loss(batch_of(HISTORIES, TARGETS))[0].backward()
    touched = tokens.grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [i not in COLD for i in range(N)]


# What holds for every retriever.


def test_nothing_at_or_after_the_target_position_reaches_the_prediction():
    model = build(reconstruction_weight=0.0)
    before = model.loss(batch_of([[1, 2, 4, 5]], [(0, 2, 6)]))[0]
    torch.testing.assert_close(before, model.loss(batch_of([[1, 2, 9, 0]], [(0, 2, 6)]))[0], rtol=0, atol=0)
    assert before != model.loss(batch_of([[1, 7, 4, 5]], [(0, 2, 6)]))[0]


def test_only_the_last_events_of_a_long_history_count():
    model = build(max_length=3)
    torch.testing.assert_close(outputs(model, [7, 8, 1, 2, 4]), outputs(model, [1, 2, 4]))
    with pytest.raises(DataError, match=r"row 0 has 4 events"):
        model.loss(batch_of([[1, 2, 4, 5]], [(0, 4, 6)]))


def test_an_empty_history_and_no_targets_worth_training_on():
    model = build()
    assert outputs(model, []).isfinite().all()
    assert model.encode(batch_of([[], []])).values.shape == (2, 4, 8)
    loss, parts = model.loss(batch_of([[]], [(0, 0, 3)]))
    assert loss == 0 and parts["reconstruction"] == 0


def test_order_matters_between_items():
    model = build()
    assert not torch.allclose(outputs(model, [1, 2]), outputs(model, [2, 1]))


def test_a_warm_start_is_the_collaborative_model_seen_through_queries():
    """With W = 1 and equal positions, a query that stands where the start token stood attends to the same collaborative tokens."""
    plain = ItemTable(N, item_table().warm)
    collaborative = SASRec(SASRec.Config(dim=8, max_length=6, dropout=0.0), plain).double()
    items = ItemTable(N, plain.warm, item_table().text, collaborative.collaborative_vectors())
    model = build(items=items, semantic_tokens=2)
    apart = model.queries.detach().clone()
    model.warm_start(collaborative)
    for ours, theirs in zip(model.transformer.parameters(), collaborative.transformer.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours is not theirs
    assert torch.equal(model.tokenize(model.content, model.collaborative)[:, 0], collaborative.item_vectors())
    assert torch.equal(model.queries - apart, collaborative.start.expand(3, -1))
    # The empty history: query and start token attend to themselves alone, at position 0.
    model.queries.data[:] = collaborative.start
    start = collaborative.encode(batch_of([[]])).values[0, 0]
    torch.testing.assert_close(outputs(model, [])[0], start)


@pytest.mark.parametrize("other", [{"dim": 4}, {"blocks": 1}, {"max_length": 5}])
def test_a_warm_start_needs_equal_sizes(other):
    collaborative = SASRec(SASRec.Config(**{"dim": 8, "max_length": 6, **other}), ItemTable(N, item_table().warm))
    with pytest.raises(ConfigError, match=f"warm_start: {next(iter(other))}: expected {next(iter(other.values()))} as in"):
        build().warm_start(collaborative)


def test_state_and_beta_rebuild_the_model():
    model, other = build(0), build(1)
    model.set_beta(0.7)
    other.load_state_dict(model.state_dict())
    other.load_extra_state(model.extra_state())
    assert model.extra_state() == {"beta": 0.7}
    torch.testing.assert_close(other.encode(batch_of(HISTORIES)).values, model.encode(batch_of(HISTORIES)).values)


def test_gradients_against_finite_differences():
    model = build(dim=4, blocks=2, ffn_multiplier=1, semantic_tokens=1, ae_hidden=(3,))
    batch = batch_of([[1, 2], []], [(0, 2, 4), (0, 1, 2), (1, 0, 5)])
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def loss(*parameters):
        return functional_call(_Loss(model), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}, (batch,))

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)[0]


@pytest.mark.parametrize("missing", ["text", "collaborative"])
def test_missing_features_are_named(missing):
    items = item_table()
    fields = {"text": items.text, "collaborative": items.collaborative, missing: None}
    with pytest.raises(ConfigError, match=rf"setrec: items\.{missing}: expected .* got None"):
        build(items=ItemTable(N, items.warm, **fields))


def test_features_must_have_a_row_for_each_item():
    items = item_table()
    with pytest.raises(DataError, match=r"items\.collaborative: expected count=12 rows, got 11"):
        build(items=ItemTable(N, items.warm, items.text, items.collaborative[1:]))


def test_another_catalogue_must_have_features_of_the_same_width():
    items = item_table()
    with pytest.raises(DataError, match=r"items\.text: expected 7 columns as in training, got 6"):
        build().replace_items(ItemTable(N, items.warm, items.text[:, :6], items.collaborative))


def test_rows_beyond_the_catalogue_are_refused():
    with pytest.raises(CannotScoreNewItems, match=r"items: row 12: the model knows the catalogue rows 0 to 11 only"):
        build().encode(batch_of([[12]]))


# The alignment check.


def planted():
    """Walks on a ring whose items have the coordinates of their place, so that successive items are near each other."""
    g = torch.Generator().manual_seed(0)
    count = 40
    angle = torch.arange(count) * 2 * torch.pi / count
    vectors = torch.stack((angle.cos(), angle.sin()), 1)
    order = torch.randperm(count, generator=g)  # ids say nothing about places
    walks = [order[(torch.randint(count, (1,), generator=g) + torch.arange(12)) % count].tolist() for _ in range(60)]
    table = torch.empty_like(vectors)
    table[order] = vectors
    return table, batch_of(walks)


def test_alignment_tells_a_right_table_from_one_that_is_off_by_a_row():
    table, histories = planted()
    assert alignment(table, histories) > 0.9
    assert abs(alignment(table.roll(1, 0), histories)) < 0.25


def test_alignment_equals_all_pairs_by_brute_force_and_leaves_blank_rows_out():
    table, _ = planted()
    table[[2, 5]] = 0
    histories = batch_of([[1, 2, 3, 4], [7], [6, 5], [9, 8, 7]])
    pairs = [(3, 4), (9, 8), (8, 7)]
    centred = F.normalize(table - table[table.abs().sum(1) > 0].mean(0), dim=1)
    near = sum(float(centred[a] @ centred[b]) for a, b in pairs) / 3
    random = sum(float(centred[a] @ centred[b]) for a, _ in pairs for _, b in pairs) / 9
    assert alignment(table, histories) == pytest.approx(near - random, abs=1e-6)


def test_alignment_needs_a_pair():
    table, _ = planted()
    with pytest.raises(DataError, match="no history has two successive items"):
        alignment(table, batch_of([[1], [2], []]))


def test_a_sample_of_the_catalogue_is_corrected_for_how_it_was_drawn(monkeypatch):
    batch = batch_of(HISTORIES, TARGETS)
    model = build(negatives=5)
    warm = model.warm.nonzero()[:, 0]
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.tensor([0, 3, 3, 7, 9]))
    drawn = warm[[0, 3, 3, 7, 9]]
    whole = build()
    seen = torch.tensor([[p for _, p, _ in TARGETS]])
    losses = []
    tokens = whole.tokenize(whole.content, whole.collaborative)
    for (row, position, item), _ in zip(TARGETS, seen[0], strict=True):
        state = set_outputs(whole, tokens[HISTORIES[row][:position]])
        for slot in range(4):
            target = state[slot] @ tokens[item, slot]
            others = [(state[slot] @ tokens[j, slot]).exp() * len(warm) / 5 for j in drawn.tolist() if j != item]
            losses.append(torch.log(target.exp() + sum(others)) - target)
    loss, parts = model.loss(batch)
    torch.testing.assert_close(parts["cross_entropy"], torch.stack(losses).mean())
    torch.testing.assert_close(parts["reconstruction"], whole.loss(batch)[1]["reconstruction"])
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("key_value.bias"))


def test_a_sample_tokenizes_what_it_needs_alone(monkeypatch):
    model, seen = build(negatives=2), []
    tokenize = model.tokenize
    monkeypatch.setattr(model, "tokenize", lambda content, collaborative: seen.append(len(content)) or tokenize(content, collaborative))
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.tensor([0, 1]))
    model.loss(batch_of([[1, 2]], [(0, 2, 4), (0, 1, 2)]))
    assert seen == [4]  # 0 and 1 drawn, 1 and 2 seen, 2 and 4 wanted
