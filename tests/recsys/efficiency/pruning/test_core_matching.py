# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.cost import Cost
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.core_matching import (
    CoreMatching,
    core_frequency,
    match_score,
    sentence_core,
    slice_ffn,
    token_core,
)
from recsys.efficiency.schedule import PruneSchedule
from recsys.efficiency.selectors import Elbow
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = torch.tensor([5, 0, 9, 1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_view(lengths=LENGTHS, protect_last=False, dim=3, seed=0):
    view = TokenView.of(torch.randn(int(lengths.sum()), dim, generator=seeded(seed), dtype=torch.float64), offsets_of(lengths))
    if not protect_last:
        return view
    protected = torch.zeros(len(view.values), dtype=torch.bool)
    protected[view.offsets[1:][lengths > 0] - 1] = True
    return TokenView.of(view.values, view.offsets, protected=protected)


def hidden_of(view, neurons=12, seed=1):
    return torch.randn(len(view.values), neurons, generator=seeded(seed), dtype=torch.float64)


def scorer(**settings):
    return CoreMatching(CoreMatching.Config(**settings))


def brute_token_core(a, rho):
    positive = sorted((float(x) for x in a if x > 0), reverse=True)
    if not positive:
        return set()
    count = next(k for k in range(len(positive) + 1) if k >= rho * len(positive) - 1e-9)
    return {n for n, x in enumerate(a.tolist()) if x > 0 and x >= positive[count - 1]}


@pytest.mark.parametrize("rho", [0.1, 0.4, 0.75, 1.0])
def test_token_core_is_the_highest_share_of_the_positive_activations(rho):
    hidden = hidden_of(a_view())
    hidden[3] = -hidden[3].abs()  # nothing is active
    core = token_core(hidden, rho)
    for a, found in zip(hidden, core, strict=True):
        assert set(found.nonzero()[:, 0].tolist()) == brute_token_core(a, rho)


def test_the_sentence_core_is_the_most_frequent_share():
    view = a_view()
    core = token_core(hidden_of(view), 0.4)
    frequency = core_frequency(core, view.offsets)
    found = sentence_core(frequency, 0.4)
    assert found.sum(1).tolist() == [5] * 4  # ceil(.4 * 12), in the empty row too
    for b in range(4):
        own = core[view.offsets[b] : view.offsets[b + 1]].sum(0)
        assert torch.equal(frequency[b], own)
        assert set(found[b].nonzero()[:, 0].tolist()) == set(sorted(range(12), key=lambda n: (-own[n], n))[:5])
    assert bool(sentence_core(frequency, 1.0).all())


@pytest.mark.parametrize("rho", [0.4, 1.0])
def test_the_match_score_is_the_size_of_the_intersection(rho):
    view = a_view()
    hidden = hidden_of(view)
    found = scorer(rho=rho, beta=0.5).score(view, LayerProbe(0, ffn_hidden=hidden))
    for s, b in enumerate(view.rows.tolist()):
        cores = [brute_token_core(a, rho) for a in hidden[view.offsets[b] : view.offsets[b + 1]]]
        counts = [sum(n in core for core in cores) for n in range(12)]
        ranked = [n for n in sorted(range(12), key=lambda n: (-counts[n], n))[:6] if counts[n]]
        assert found[s] == len({n for n in range(12) if hidden[s, n] > 0} & set(ranked))


def test_the_match_of_two_tokens_is_symmetric_and_the_gram_matrix():
    active = hidden_of(a_view(torch.tensor([7]))) > 0
    offsets = torch.tensor([0, 7])
    columns = torch.stack([match_score(active, active[i : i + 1], offsets) for i in range(7)], 1)
    assert torch.equal(columns, columns.t())
    assert torch.equal(columns, active.float() @ active.float().t())


def test_rescaling_a_tokens_activations_changes_nothing():
    view = a_view()
    hidden = hidden_of(view)
    scaled = hidden * torch.rand(len(hidden), 1, generator=seeded(5), dtype=torch.float64).add(0.1)
    assert torch.equal(token_core(hidden, 0.4), token_core(scaled, 0.4))
    one, two = (scorer().score(view, LayerProbe(0, ffn_hidden=h)) for h in (hidden, scaled))
    assert torch.equal(one, two) and one.unique().numel() > 1


def test_only_the_protected_tokens_are_the_reference():
    view = a_view(protect_last=True)
    hidden = hidden_of(view)
    score = scorer(rho=1.0, beta=1.0, reference="protected").score(view, LayerProbe(0, ffn_hidden=hidden))
    last = view.offsets[1:][view.rows] - 1
    assert torch.equal(score, ((hidden > 0) & (hidden[last] > 0)).sum(1).double())  # the release's Bm Bm[ref]
    changed = hidden.clone()
    changed[0] = hidden[0].flip(0)
    again = scorer(rho=1.0, beta=1.0, reference="protected").score(view, LayerProbe(0, ffn_hidden=changed))
    assert torch.equal(again[1:], score[1:])


def test_neurons_that_fill_up_a_slice_do_not_count_for_scores():
    view = TokenView.of(torch.zeros(2, 1), torch.tensor([0, 2]), protected=torch.tensor([False, True]))
    hidden = torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, 1.0]])
    made = scorer(rho=1.0, beta=0.75, reference="protected")
    probe = LayerProbe(0, ffn_hidden=hidden)
    assert made.score(view, probe).tolist() == [1.0, 1.0]
    assert made.core(view, probe).tolist() == [[True, True, False, True]]


def test_a_row_is_judged_by_itself():
    view = a_view(protect_last=True)
    hidden = hidden_of(view)
    for reference in ("row", "protected"):
        made = scorer(reference=reference)
        whole = made.score(view, LayerProbe(0, ffn_hidden=hidden))
        cores = made.core(view, LayerProbe(0, ffn_hidden=hidden))
        for b in range(4):
            own = slice(int(view.offsets[b]), int(view.offsets[b + 1]))
            alone = TokenView.of(view.values[own], torch.tensor([0, own.stop - own.start]), protected=view.protected[own])
            probe = LayerProbe(0, ffn_hidden=hidden[own])
            assert torch.equal(made.score(alone, probe), whole[own])
            assert torch.equal(made.core(alone, probe)[0], cores[b])


def test_no_tokens_at_all():
    view = a_view(torch.tensor([0, 0]))
    probe = LayerProbe(0, ffn_hidden=torch.zeros(0, 6, dtype=torch.float64))
    assert scorer().score(view, probe).shape == (0,)
    assert scorer().core(view, probe).shape == (2, 6)


def planted(shared=8, others=12, neurons=64):
    """Tokens that use the reference's neurons, scattered among tokens that use other ones; the reference is the last."""
    kinds = torch.tensor([1] * shared + [0] * others)[torch.randperm(shared + others, generator=seeded(2))]
    kinds = torch.cat((kinds, torch.tensor([1])))
    noise = torch.rand(len(kinds), neurons, generator=seeded(3))
    own = torch.arange(neurons) < neurons // 2
    used = torch.where(kinds[:, None] == 1, own, ~own) & (noise > 0.2)
    return kinds == 1, torch.where(used, noise, -noise)


def test_tokens_of_the_references_subspace_survive_the_elbow():
    shared, hidden = planted()
    protected = torch.zeros(len(shared), dtype=torch.bool)
    protected[-1] = True
    view = TokenView.of(torch.zeros(len(shared), 2), torch.tensor([0, len(shared)]), protected=protected)
    scores = scorer(rho=0.8, beta=0.5, reference="protected").score(view, LayerProbe(0, ffn_hidden=hidden))
    kept = Elbow(Elbow.Config(at_least=2)).select(view, scores)
    assert torch.equal(kept.mask(), shared)


def test_the_elbow_of_a_step_is_the_step_and_a_line_is_kept_whole():
    view = TokenView.of(torch.zeros(20, 1), torch.tensor([0, 10, 20]))
    scores = torch.cat((torch.tensor([1.0, 9.0] * 5), torch.arange(10.0)))
    kept = Elbow(Elbow.Config(at_least=1)).select(view, scores).mask()
    assert kept[:10].tolist() == [False, True] * 5
    assert bool(kept[10:].all())


def test_inside_a_model_only_core_tokens_go_on():
    shared, hidden = planted()
    protected = torch.arange(len(shared)) == len(shared) - 1
    view = TokenView.of(torch.randn(len(shared), 2, generator=seeded()), torch.tensor([0, len(shared)]), protected=protected)
    seen = []

    def layer(tokens):
        seen.append(tokens.positions)
        return tokens.values + 1, LayerProbe(0, ffn_hidden=hidden[tokens.positions])

    config = PruneSchedule.Config(
        keep={0: 1.0},
        scorer=CoreMatching.Config(rho=0.8, beta=0.5, reference="protected"),
        selector=Elbow.Config(at_least=2),
    )
    values, chosen = PruneSchedule(config)([layer, layer], view)
    assert torch.equal(chosen.mask(), shared) and torch.equal(values, view.values[shared] + 2)
    assert torch.equal(seen[1], shared.nonzero()[:, 0])


def networks(dim=6, neurons=10, bias=True, gated=True, dtype=torch.float64):
    torch.manual_seed(0)
    enter = [nn.Linear(dim, neurons, bias=bias, dtype=dtype) for _ in range(2 if gated else 1)]
    return [*enter, nn.Linear(neurons, dim, bias=bias, dtype=dtype)]


def full(layers, x, activation, mask=None):
    *enter, leave = layers
    hidden = activation(enter[0](x))
    hidden = hidden * enter[1](x) if len(enter) == 2 else hidden
    return leave(hidden if mask is None else hidden * mask)


FORMS = [(True, True, F.silu), (True, False, F.relu), (False, True, F.relu), (False, False, F.gelu)]


@pytest.mark.parametrize(("gated", "bias", "activation"), FORMS)
def test_a_sliced_network_is_the_full_one_with_masked_activations(gated, bias, activation):
    layers = networks(bias=bias, gated=gated)
    x = torch.randn(4, 3, 6, generator=seeded(), dtype=torch.float64)
    core = torch.rand(4, 10, generator=seeded(1)) < torch.tensor([[0.2], [0.9], [0.5], [0.0]])  # sets of unequal sizes, one empty
    by_row = slice_ffn(core, layers, activation)(x)
    torch.testing.assert_close(by_row, full(layers, x, activation, core[:, None]), rtol=0, atol=1e-12)
    union = slice_ffn(core[:2], layers, activation, "union")
    torch.testing.assert_close(union(x), full(layers, x, activation, core[:2].any(0)), rtol=0, atol=1e-12)
    one = slice_ffn(core[2], layers, activation)
    torch.testing.assert_close(one(x[0, 0]), full(layers, x[0, 0], activation, core[2]), rtol=0, atol=1e-12)
    torch.testing.assert_close(one(x[:1]), full(layers, x[:1], activation, core[2]), rtol=0, atol=1e-12)


def test_all_neurons_are_the_dense_network():
    layers, view = networks(), a_view(torch.tensor([4, 2]), dim=6)
    hidden = F.silu(layers[0](view.values)) * layers[1](view.values)
    core = scorer(rho=1.0, beta=1.0).core(view, LayerProbe(0, ffn_hidden=hidden))
    x = torch.randn(2, 5, 6, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(slice_ffn(core, layers, F.silu)(x), full(layers, x, F.silu), rtol=0, atol=1e-10)


def test_a_sliced_row_is_independent_of_its_batch_mates():
    layers = networks()
    core = torch.rand(3, 10, generator=seeded(1)) < 0.4
    x = torch.randn(3, 2, 6, generator=seeded(), dtype=torch.float64)
    together = slice_ffn(core, layers, F.silu)(x)
    for b in range(3):
        torch.testing.assert_close(slice_ffn(core[b], layers, F.silu)(x[b : b + 1])[0], together[b], rtol=0, atol=1e-14)


def test_a_slice_costs_its_share_of_multiply_adds_and_gathers_nothing_while_decoding():
    layers = networks(64, 256, dtype=torch.float32)
    core = sentence_core(torch.rand(2, 256, generator=seeded()), 0.4)
    sliced = slice_ffn(core, layers, F.silu)
    x = torch.randn(2, 8, 64)
    with Cost() as dense, torch.no_grad():
        full(layers, x, F.silu)
    with Cost() as cut, torch.no_grad():
        sliced(x)
    assert dense.macs / cut.macs == pytest.approx(256 / 103)
    assert cut.gathered_bytes == 0
    assert all(buffer.is_contiguous() and not buffer.requires_grad for buffer in sliced.buffers())


def test_errors_name_what_is_wrong():
    view = a_view()
    with pytest.raises(ConfigError, match="probe"):
        scorer().score(view)
    with pytest.raises(ConfigError, match="ffn_hidden"):
        scorer().score(view, LayerProbe(2))
    with pytest.raises(ConfigError, match="protected"):
        scorer(reference="protected").score(view, LayerProbe(0, ffn_hidden=hidden_of(view)))
    bare = TokenView.of(view.values, view.offsets, protected=torch.arange(len(view.values)) == 0)
    with pytest.raises(ConfigError, match="row 2"):
        scorer(reference="protected").score(bare, LayerProbe(0, ffn_hidden=hidden_of(view)))
    with pytest.raises(ConfigError, match=r"rho.*1\.5"):
        token_core(hidden_of(view), 1.5)
    with pytest.raises(ConfigError, match="layers"):
        slice_ffn(torch.ones(10, dtype=torch.bool), networks()[:1], F.silu)
    with pytest.raises(DataError, match="core"):
        slice_ffn(torch.ones(9, dtype=torch.bool), networks(), F.silu)
    with pytest.raises(DataError, match="x: expected"):
        slice_ffn(torch.ones(2, 10, dtype=torch.bool), networks(), F.silu)(torch.zeros(3, 1, 6, dtype=torch.float64))
