# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recsys.core.errors import ConfigError, DataError
from recsys.efficiency.cost import Cost
from recsys.efficiency.probe import LayerProbe
from recsys.efficiency.pruning.adaptive_sparse import (
    AdaptiveSparseEncoder,
    ClassAttention,
    LearnedThreshold,
    distillation_loss,
    head_weighted,
    layer_macs,
    masked_softmax,
)
from recsys.efficiency.routing.dispatch import BudgetLoss
from recsys.efficiency.schedule import PruneSchedule
from recsys.efficiency.selectors import Threshold
from recsys.efficiency.view import TokenView, offsets_of

LENGTHS = torch.tensor([12, 0, 7, 1, 20])
KEEP = (0.7, 0.4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_view(lengths=LENGTHS, dim=8, seed=0, classes=1, **others):
    values = torch.randn(int(lengths.sum()), dim, generator=seeded(seed), dtype=torch.float64)
    context = torch.randn(len(lengths), classes, dim, generator=seeded(seed + 1), dtype=torch.float64) if classes else None
    return TokenView.of(values, offsets_of(lengths), context=context, **others)


def row(view, b):
    own = slice(int(view.offsets[b]), int(view.offsets[b + 1]))
    groups, protected = (None if x is None else x[own] for x in (view.groups, view.protected))
    context = None if view.context is None else view.context[b : b + 1]
    return TokenView.of(view.values[own], torch.tensor([0, own.stop - own.start]), groups=groups, protected=protected, context=context)


def an_encoder(keep=KEEP, view=None, dtype=torch.float64, **settings):
    torch.manual_seed(3)
    config = AdaptiveSparseEncoder.Config(dim=8, heads=2, layers=4, hidden=12, stages=(1, 3), thresholds=(-1.0, -1.0), **settings)
    encoder = AdaptiveSparseEncoder(config).to(dtype)
    for block in encoder.blocks:
        nn.init.normal_(block.qkv.weight, std=0.6)  # attention that is not flat
    if keep is not None:
        encoder.calibrate(a_view() if view is None else view, keep)
    return encoder.eval()


def dense(encoder, view):
    """The same encoder, row by row, in plain PyTorch, with nothing dropped."""
    contexts, tokens = [], []
    for b in range(len(view)):
        own = row(view, b)
        front = encoder.class_token if own.context is None else own.context[0]
        x = torch.cat((front, own.values))
        for block in encoder.blocks:
            q, k, v = (p.unflatten(-1, (2, -1)).transpose(0, 1) for p in block.qkv(block.norm_attention(x)).chunk(3, -1))
            attended = (q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(-1) @ v
            x = x + block.out(attended.transpose(0, 1).flatten(1))
            x = x + block.ffn(block.norm_ffn(x))
        x = encoder.norm(x)
        contexts.append(x[: len(front)])
        tokens.append(x[len(front) :])
    return torch.stack(contexts), torch.cat(tokens)


def close(one, two, atol=1e-10):
    torch.testing.assert_close(one, two, rtol=0, atol=atol)


# The score


def test_head_weights_sum_to_one_and_equal_norms_give_the_mean_attention():
    outputs = torch.randn(9, 4, 5, generator=seeded(), dtype=torch.float64)
    close(head_weighted(torch.ones(9, 4, dtype=torch.float64), outputs), torch.ones(9, dtype=torch.float64), 1e-7)
    attention = torch.rand(9, 4, generator=seeded(1), dtype=torch.float64)
    close(head_weighted(attention, F.normalize(outputs, dim=-1)), attention.mean(-1), 1e-7)
    norms = outputs.square().sum(-1).sqrt()
    close(head_weighted(attention, outputs), torch.stack([(attention[j] * norms[j]).sum() / norms[j].sum() for j in range(9)]), 1e-7)


def test_the_stages_scores_are_the_papers():
    view, encoder = a_view(torch.tensor([6])), an_encoder(None)
    block = encoder.blocks[0]
    x = torch.cat((view.context[0], view.values))
    q, k, v = (p.unflatten(-1, (2, -1)).transpose(0, 1) for p in block.qkv(block.norm_attention(x)).chunk(3, -1))
    attention = (q @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(-1)
    norms = (attention @ v).norm(dim=-1)
    expected = (attention[:, 0] * norms / (norms.sum(0) + 1e-8)).sum(0)[1:]
    for keep in (None, torch.ones(6, dtype=torch.float64)):
        close(block(view.context, view.values, view.offsets, keep, True)[2], expected, 1e-12)


def test_the_probe_scorer_against_loops():
    view = a_view(torch.tensor([4, 0, 3]), classes=2)
    query = torch.randn(3, 4, 2, 5, generator=seeded(4), dtype=torch.float64)
    key, value = (torch.randn(7, 2, 5, generator=seeded(s), dtype=torch.float64) for s in (5, 6))
    scores = ClassAttention(ClassAttention.Config()).score(view, LayerProbe(0, query=query, key=key, value=value))
    for b in (0, 2):
        own = slice(int(view.offsets[b]), int(view.offsets[b + 1]))
        expected = 0
        norms = value[own].norm(dim=-1).repeat_interleave(2, 1)
        for h in range(4):
            attention = (query[b, h] @ key[own, h // 2].t() / 5**0.5).softmax(-1).mean(0)
            expected = expected + attention * norms[:, h] / norms.sum(1)
        close(scores[own], expected, 1e-7)
    with pytest.raises(ConfigError, match="query"):
        ClassAttention(ClassAttention.Config()).score(view, LayerProbe(1, key=key))


def test_inside_a_model_what_the_context_looks_at_goes_on():
    view = a_view(torch.tensor([6, 3]))
    looked_at = torch.tensor([True, False, False, True, False, False, True, True, False])

    def layer(tokens):
        key = 8 * looked_at[tokens.positions + 6 * tokens.rows].double()[:, None, None].expand(-1, 2, 4)
        query = torch.ones(2, 2, 1, 4, dtype=torch.float64)
        return tokens.values + 1, LayerProbe(0, query=query, key=key, value=key + 1)

    config = PruneSchedule.Config(keep={0: 1.0}, scorer=ClassAttention.Config(), selector=Threshold.Config(threshold=0.1))
    _, chosen = PruneSchedule(config)([layer], view)
    kept = looked_at.clone()
    kept[view.offsets[1:] - 1] = True  # the last of each row always goes on
    assert torch.equal(chosen.mask(), kept)


# The masked softmax


def test_masked_softmax_is_softmax_over_what_is_kept_and_oneself():
    logits = 40 * torch.randn(2, 3, 5, 5, generator=seeded(), dtype=torch.float64)
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.float64)
    readable = keep.bool()[:, None, None] | torch.eye(5, dtype=torch.bool)
    expected = logits.masked_fill(~readable, -torch.inf).softmax(-1)
    close(masked_softmax(logits, keep), expected, 1e-12)
    close(masked_softmax(logits, keep, 1e-6), expected, 1e-5)
    close(masked_softmax(logits, keep, 1e-3).sum(-1), torch.ones(2, 3, 5, dtype=torch.float64), 1e-12)


def test_padding_takes_no_part_in_eps():
    logits = torch.randn(1, 1, 3, 3, generator=seeded(), dtype=torch.float64)
    padded = masked_softmax(
        F.pad(logits, (0, 2, 0, 2)), torch.tensor([[1.0, 0, 1, 0, 0]]).double(), 0.1, torch.tensor([[True] * 3 + [False] * 2])
    )
    close(padded[..., :3, :3], masked_softmax(logits, torch.tensor([[1.0, 0, 1]]).double(), 0.1), 1e-14)
    assert bool((padded[..., :3, 3:] == 0).all())


def test_masked_softmax_has_the_gradient_of_logits_and_decisions():
    logits = torch.randn(1, 2, 4, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[0.3, 0.9, 0.5, 0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, g: masked_softmax(a, g, 1e-6), (logits, keep))


def test_a_huge_dropped_logit_gives_no_nan():
    logits = torch.zeros(1, 1, 3, 3, requires_grad=True)
    keep = torch.tensor([[1.0, 0.0, 1.0]], requires_grad=True)
    weights = masked_softmax(logits + torch.tensor([0.0, 1e4, 0.0]), keep)
    weights[..., 0, :].square().sum().backward()
    close(weights[0, 0, 0], torch.tensor([0.5, 0.0, 0.5]), 1e-7)
    assert bool(keep.grad.isfinite().all() and logits.grad.isfinite().all())


# The thresholds


def test_a_threshold_decides_the_same_in_both_modes_and_has_a_sigmoids_gradient():
    scores = torch.randn(50, generator=seeded(), dtype=torch.float64)
    threshold = LearnedThreshold(0.1, 0.2).double()
    kept = threshold(scores)
    assert torch.equal(kept, (scores > 0.1).double()) and torch.equal(threshold.eval()(scores), kept)
    kept.sum().backward()
    soft = ((scores - 0.1) / 0.2).sigmoid()
    assert float(threshold.threshold.grad) == pytest.approx(-float((soft * (1 - soft) / 0.2).sum()), rel=1e-6)


def test_fitting_keeps_the_share_and_takes_the_temperature_from_the_spread():
    scores = torch.rand(200, generator=seeded(), dtype=torch.float64) / 1000
    threshold = LearnedThreshold().double()
    for keep in (0.05, 0.5, 0.73, 1.0):
        threshold.fit(scores, keep)
        assert int(threshold(scores).sum()) == round(200 * keep)
        assert float(threshold.temperature) == pytest.approx(0.05 * float(scores.std(correction=0)))
    threshold.fit(torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0]).double(), 0.4)
    assert threshold.threshold.item() == 1.5
    threshold.fit(scores, 0.5)
    threshold.fit(scores, 0.5, spread=None)
    threshold(scores).sum().backward()
    assert float(threshold.threshold.grad) < -100


# The encoder


@pytest.mark.parametrize("classes", [0, 1, 2])
def test_thresholds_of_minus_infinity_are_the_dense_encoder(classes):
    view, encoder = a_view(classes=classes), an_encoder(None)
    nn.init.constant_(encoder.thresholds[0].threshold, -torch.inf)
    nn.init.constant_(encoder.thresholds[1].threshold, -torch.inf)
    context, tokens = dense(encoder, view)
    for mode in (True, False):
        found = encoder.train(mode)(view)
        close(found.context, context)
        close(found.tokens, tokens)
        assert torch.equal(found.selection.index, torch.arange(40))
    encoder.config = encoder.config.model_copy(update={"eps": 1e-6})
    close(encoder.train()(view).context, context, 1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_form_of_training_is_the_form_of_inference(seed):
    encoder, view = an_encoder(), a_view(seed=seed)
    infer, train = encoder.eval()(view), encoder.train()(view)
    assert torch.equal(infer.selection.index, train.selection.index) and torch.equal(infer.selection.offsets, train.selection.offsets)
    assert 0 < len(infer.selection.index) < 40
    for field in ("context", "tokens", "costs"):
        close(getattr(train, field), getattr(infer, field), 1e-12)
    encoder.config = encoder.config.model_copy(update={"eps": 1e-6})
    close(encoder(view).context, infer.context, 1e-3)


def test_rows_keep_numbers_of_their_own_and_are_independent_of_their_batch_mates():
    view, encoder = a_view(torch.tensor([20, 20, 0, 20, 5])), an_encoder(eps=1e-3)
    for mode in (False, True):
        whole = encoder.train(mode)(view)
        assert whole.selection.lengths[[0, 1, 3]].unique().numel() > 1
        for b in range(5):
            alone = encoder(row(view, b))
            own = slice(int(whole.selection.offsets[b]), int(whole.selection.offsets[b + 1]))
            assert torch.equal(alone.selection.index + view.offsets[b], whole.selection.index[own])
            close(alone.context[0], whole.context[b], 1e-12)
            close(alone.tokens, whole.tokens[own], 1e-12)


def test_what_was_dropped_stays_dropped():
    """A second threshold that would keep everything brings nothing back, and what was dropped has no influence after the first stage."""
    encoder, view = an_encoder(), a_view()
    nn.init.constant_(encoder.thresholds[1].threshold, -torch.inf)
    infer, train = encoder.eval()(view), encoder.train()(view)
    only_first = int(KEEP[0] * 40)
    assert abs(len(infer.selection.index) - only_first) <= 1
    assert torch.equal(infer.selection.index, train.selection.index)
    nested = an_encoder().eval()(view).selection
    assert set(nested.index.tolist()) < set(infer.selection.index.tolist())


def test_protected_tokens_and_whole_groups_stay_in_order():
    groups = torch.cat([torch.arange(int(n)) // 3 + 100 * b for b, n in enumerate(LENGTHS)])
    protected = torch.zeros(40, dtype=torch.bool)
    protected[torch.tensor([2, 17, 39])] = True
    view = a_view(groups=groups, protected=protected)
    for encoder in (an_encoder(view=view), an_encoder(None)):
        if encoder.thresholds[0].threshold == -1:
            nn.init.constant_(encoder.thresholds[0].threshold, torch.inf)  # everything that may go goes
        selections = [encoder.train(mode)(view).selection for mode in (False, True)]
        assert torch.equal(selections[0].index, selections[1].index)
        kept = selections[0].mask()
        assert bool((selections[0].index.diff() > 0).all())
        for g in groups.unique():
            assert kept[groups == g].unique().numel() == 1
        assert bool(kept[torch.isin(groups, groups[protected])].all())
    assert torch.equal(kept, torch.isin(groups, groups[protected]))


def test_rows_that_lose_everything_and_batches_without_any():
    encoder = an_encoder(None)
    nn.init.constant_(encoder.thresholds[0].threshold, torch.inf)
    for mode in (False, True):
        found = encoder.train(mode)(a_view())
        assert found.tokens.shape == (0, 8) and bool(found.context.isfinite().all())
        assert encoder(a_view(torch.tensor([0, 0]))).context.shape == (2, 1, 8)
        assert encoder(a_view(torch.zeros(0, dtype=torch.long))).context.shape == (0, 1, 8)


def test_it_is_deterministic_and_the_calibration_keeps_its_shares():
    view = a_view(torch.tensor([100, 60, 40]))
    encoder = an_encoder((0.7, 0.4), view)
    one, two = encoder(view), encoder(view)
    assert torch.equal(one.tokens, two.tokens) and len(one.selection.index) == 80
    again = an_encoder((0.7, 0.4), view)
    assert all(torch.equal(p, q) for p, q in zip(encoder.parameters(), again.parameters(), strict=True))
    assert not encoder.training


# The budget


@pytest.mark.parametrize("classes", [1, 2])
def test_the_formula_is_what_is_executed(classes):
    view = a_view(torch.tensor([20]), classes=classes)
    encoder = an_encoder(view=view)
    with Cost() as cost, torch.no_grad():
        found = encoder(view)
    dense_macs = layer_macs(torch.tensor(20.0 + classes, dtype=torch.float64), 8, 12)
    assert float(found.costs.sum() * dense_macs) == pytest.approx(cost.macs, rel=1e-9)
    assert float(found.costs.mean()) < 0.85
    by_hand = 4 * 8 * 8 * (20 + classes) + 2 * 8 * (20 + classes) ** 2 + 2 * 8 * 12 * (20 + classes)
    assert float(dense_macs) == by_hand


def test_a_higher_threshold_costs_less():
    view, encoder = a_view(), an_encoder().train()
    budget = BudgetLoss(BudgetLoss.Config(budget=0.1, weight=2.0))
    for threshold in encoder.thresholds:
        nn.init.constant_(threshold.temperature, 0.02)
    costs = encoder(view).costs
    costs.mean().backward()
    slopes = [float(threshold.threshold.grad) for threshold in encoder.thresholds]
    assert all(slope < -1e-3 for slope in slopes)
    encoder.zero_grad()
    budget(encoder(view).costs).backward()
    for threshold, slope in zip(encoder.thresholds, slopes, strict=True):
        assert float(threshold.threshold.grad) == pytest.approx(2 * slope)
    dearer = float(costs.detach().mean())
    encoder.thresholds[0].threshold.data += 0.05
    assert float(encoder(view).costs.detach().mean()) < dearer


def test_training_the_thresholds_alone_reaches_the_budget():
    view, encoder = a_view(torch.tensor([20] * 8)), an_encoder((0.95, 0.9), a_view(torch.tensor([20] * 8))).train()
    budget = BudgetLoss(BudgetLoss.Config(budget=0.65, weight=2.0, norm="l2"))
    for threshold in encoder.thresholds:
        nn.init.constant_(threshold.temperature, 0.02)
    optimizer = torch.optim.SGD([threshold.threshold for threshold in encoder.thresholds], lr=1e-3)
    before = float(encoder(view).costs.detach().mean())
    for _ in range(40):
        optimizer.zero_grad()
        budget(encoder(view).costs).backward()
        optimizer.step()
    assert before > 0.85 and float(encoder.eval()(view).costs.mean()) == pytest.approx(0.65, abs=0.03)


def test_every_parameter_learns_from_the_result_and_thresholds_are_scalars():
    encoder, view = an_encoder().train(), a_view(classes=0)
    nn.init.constant_(encoder.thresholds[0].temperature, 0.05)
    nn.init.constant_(encoder.thresholds[1].temperature, 0.05)
    target = torch.randn(5, 1, 8, generator=seeded(9), dtype=torch.float64)
    (encoder(view).context - target).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in encoder.parameters())
    assert all(threshold.threshold.dim() == 0 for threshold in encoder.thresholds)  # the optimiser decays no scalars


def test_distillation_is_the_divergence_from_the_teacher():
    student = torch.randn(6, 4, generator=seeded(), dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, generator=seeded(1), dtype=torch.float64, requires_grad=True)
    p, q = (torch.distributions.Categorical(logits=x.detach()) for x in (teacher, student))
    each = torch.distributions.kl_divergence(p, q)
    loss = distillation_loss(student, teacher)
    close(loss.detach(), each.mean(), 1e-12)
    loss.backward()
    assert teacher.grad is None and bool((student.grad != 0).any())
    keep = torch.tensor([1.0, 0, 0, 1, 1, 0]).double()
    close(distillation_loss(student, teacher, keep).detach(), each[keep.bool()].mean(), 1e-12)
    assert distillation_loss(student, teacher, torch.zeros(6).double()).item() == 0
    unpruned = copy.deepcopy(student.detach())
    assert float(distillation_loss(unpruned, unpruned)) == 0


def test_errors_name_what_is_wrong():
    for settings, name in (
        ({"heads": 3}, "heads"),
        ({"stages": (0,), "thresholds": (0.1,)}, "stages"),
        ({"stages": (5, 4), "thresholds": (0.1, 0.2)}, "stages"),
        ({"thresholds": (0.1,)}, "thresholds"),
    ):
        with pytest.raises(ValueError, match=name):
            AdaptiveSparseEncoder.Config(dim=8, **settings)
    encoder = an_encoder(None)
    with pytest.raises(DataError, match="values"):
        encoder(a_view(dim=6))
    with pytest.raises(ConfigError, match="keep"):
        encoder.calibrate(a_view(), (0.4, 0.7))
    with pytest.raises(ConfigError, match="temperature"):
        LearnedThreshold(0.1, 0.0)
    with pytest.raises(ConfigError, match="fit"):
        LearnedThreshold().fit(torch.zeros(0), 0.5)
