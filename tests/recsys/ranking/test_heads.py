# SPDX-License-Identifier: Apache-2.0
import copy
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recsys.core import components
from recsys.ranking.heads import MMoE, SharedBottom, Towers
from recsys.ranking.losses import masked_bce
from recsys.ranking.mlp import mlp
from recsys.ranking.readout import MeanReadout

NAN = float("nan")


def test_bce_is_the_mean_over_tasks_of_the_log_loss() -> None:
    logits, labels = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 2, (50, 3)).double()
    probabilities = torch.sigmoid(logits).numpy()
    expected = np.mean([log_loss(labels[:, k], probabilities[:, k], labels=[0, 1]) for k in range(3)])
    assert masked_bce(logits, labels).item() == pytest.approx(expected, rel=1e-12)


def test_unobserved_labels_do_not_count() -> None:
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, NAN], [0.0, NAN], [NAN, 1.0], [1.0, NAN]], dtype=torch.float64)
    loss = masked_bce(logits, labels)
    p = torch.sigmoid(logits.detach()).numpy()
    expected = (log_loss([1, 0, 1], p[[0, 1, 3], 0]) + log_loss([1], p[[2], 1], labels=[0, 1])) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert torch.equal(logits.grad == 0, labels.isnan())
    assert torch.autograd.gradcheck(lambda z: masked_bce(z, labels), logits)


def test_a_task_without_labels_does_not_dilute_the_others() -> None:
    logits = torch.randn(6, 2)
    labels = torch.randint(0, 2, (6, 2)).float()
    labels[:, 1] = NAN
    torch.testing.assert_close(masked_bce(logits, labels), masked_bce(logits[:, :1], labels[:, :1]))


def test_no_label_at_all_gives_zero_with_zero_gradient() -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    loss = masked_bce(logits, torch.full((3, 2), NAN))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 2))


def test_extreme_logits_stay_finite() -> None:
    assert masked_bce(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(1e4)


def test_towers_do_not_share_weights() -> None:
    towers, x = Towers(Towers.Config(hidden=(5,)), 4, 3), torch.randn(6, 4)
    assert towers(x).shape == (6, 3)
    towers(x)[:, 1].sum().backward()
    for k, tower in enumerate(towers.towers):
        assert all((p.grad is not None and p.grad.abs().max() > 0) == (k == 1) for p in tower.parameters())


def test_readout_is_the_mean_of_normed_tokens_and_ignores_their_order() -> None:
    readout, x = MeanReadout(4, 2, Towers.Config(), norm=True), torch.randn(6, 5, 4)
    nn.init.uniform_(readout.norm.weight, 0.5, 1.5)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * readout.norm.weight
    torch.testing.assert_close(readout(x), readout.head(normed.mean(1)))
    torch.testing.assert_close(readout(x.flip(1)), readout(x))
    torch.testing.assert_close(readout(x * 8), readout(x), rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    towers, x = Towers(Towers.Config(hidden=(64,), dropout=0.5), 4, 1), torch.randn(6, 4)
    assert not torch.equal(towers(x), towers(x))
    towers.eval()
    assert torch.equal(towers(x), towers(x))


HEADS = [
    Towers(Towers.Config(hidden=(5,)), 4, 3),
    SharedBottom(SharedBottom.Config(bottom=(6, 5), hidden=(3,)), 4, 3),
    SharedBottom(SharedBottom.Config(bottom=(6,)), 4, 1),
    MMoE(MMoE.Config(experts=2, expert=(6, 5), hidden=(3,)), 4, 3),
    MMoE(MMoE.Config(experts=3, expert=(6,)), 4, 1),
]


@pytest.mark.parametrize("head", HEADS)
def test_flops_are_those_that_torch_counts(head: nn.Module) -> None:
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(7, 4))
    assert counter.get_total_flops() == 7 * head.flops


@pytest.mark.parametrize("head", HEADS)
def test_heads_keep_rows_apart_run_in_half_precision_and_are_captured(head: nn.Module) -> None:
    x = torch.randn(6, 4)
    assert head(x).shape == (6, head.tasks)
    torch.testing.assert_close(head(x[2:4]), head(x)[2:4])
    torch.testing.assert_close(torch.compile(head, backend="aot_eager", fullgraph=True)(x), head(x))
    half = copy.deepcopy(head).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), head(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_of_heads_agree_with_finite_differences_and_reach_every_parameter(head: nn.Module) -> None:
    head, x = copy.deepcopy(head).double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, x)
    head(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.parameters())


def plain(head: SharedBottom | MMoE, expert: nn.Module, widths: tuple[int, ...]) -> nn.Sequential:
    """One MLP with the weights of an expert (or a bottom) and of the first tower."""
    whole = mlp(widths)
    layers = [m for part in (expert, head.towers[0]) for m in part.modules() if isinstance(m, nn.Linear)]
    for mine, theirs in zip((m for m in whole if isinstance(m, nn.Linear)), layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    return whole


def test_with_one_task_and_one_expert_mmoe_is_one_mlp_and_so_is_shared_bottom_with_one_task() -> None:
    x, widths = torch.randn(6, 4), (4, 7, 5, 3, 1)
    mmoe = MMoE(MMoE.Config(experts=1, expert=(7, 5), hidden=(3,)), 4, 1)
    torch.testing.assert_close(mmoe(x), plain(mmoe, mmoe.experts[0], widths)(x))
    shared = SharedBottom(SharedBottom.Config(bottom=(7, 5), hidden=(3,)), 4, 1)
    torch.testing.assert_close(shared(x), plain(shared, shared.bottom, widths)(x))


def test_mmoe_equals_a_loop_over_tasks_and_experts() -> None:
    mmoe, x = MMoE(MMoE.Config(experts=3, expert=(5,)), 4, 2).double(), torch.randn(6, 4, dtype=torch.float64)
    gates = mmoe.gates.weight.view(2, 3, 4)
    for b in range(6):
        for k in range(2):
            scores = [math.exp((gates[k, e] @ x[b]).item()) for e in range(3)]
            mixed = sum(score / sum(scores) * mmoe.experts[e](x[b]) for e, score in enumerate(scores))
            torch.testing.assert_close(mmoe(x)[b, k], mmoe.towers[k](mixed)[0])
    torch.testing.assert_close(mmoe.weights(x).sum(2), torch.ones(6, 2, dtype=torch.float64))


def test_experts_are_shared_and_gates_and_towers_are_not() -> None:
    mmoe = MMoE(MMoE.Config(experts=2, expert=(5,)), 4, 2)
    mmoe(torch.randn(6, 4))[:, 0].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in mmoe.experts.parameters())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in mmoe.towers[1].parameters())
    assert (mmoe.gates.weight.grad.view(2, -1).abs().amax(1) > 0).tolist() == [True, False]


def test_a_gate_with_large_scores_chooses_one_expert() -> None:
    mmoe, x = MMoE(MMoE.Config(experts=2, expert=(5,)), 4, 1), torch.randn(6, 4).abs()
    with torch.no_grad():
        mmoe.gates.weight.copy_(torch.stack([torch.full((4,), 1e4), torch.full((4,), -1e4)]))
    torch.testing.assert_close(mmoe(x), mmoe.towers[0](mmoe.experts[0](x)))


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe"])
def test_heads_are_chosen_by_name(name: str) -> None:
    cls = components.get("head", name)
    assert components.build("head", cls.Config(), 4, 2)(torch.randn(3, 4)).shape == (3, 2)


def random_weights(rows: int) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64) + 0.1


def test_weighted_bce_is_the_weighted_log_loss() -> None:
    logits, labels, weights = torch.randn(50, 3, dtype=torch.float64), torch.randint(0, 2, (50, 3)).double(), random_weights(50)
    labels[:5, 1] = NAN
    p, seen = torch.sigmoid(logits).numpy(), [slice(None), slice(5, None), slice(None)]
    expected = np.mean([log_loss(labels[s, k], p[s, k], labels=[0, 1], sample_weight=weights[s]) for k, s in enumerate(seen)])
    assert masked_bce(logits, labels, weights).item() == pytest.approx(expected, rel=1e-12)


def test_weights_only_count_against_each_other() -> None:
    logits, labels, weights = torch.randn(9, 2, dtype=torch.float64), torch.randint(0, 2, (9, 2)).double(), random_weights(9)
    expected = masked_bce(logits, labels, weights)
    for factor in (1e-6, 1e6):
        torch.testing.assert_close(masked_bce(logits, labels, factor * weights), expected)
    assert torch.equal(masked_bce(logits, labels, torch.ones(9, dtype=torch.float64)), masked_bce(logits, labels))


def test_weight_2_is_the_row_twice_and_weight_0_is_its_absence() -> None:
    logits, labels = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.randint(0, 2, (5, 2)).double()
    labels[1, 0] = NAN
    weights, rows = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0], dtype=torch.float64), torch.tensor([0, 0, 1, 3, 3, 3, 4])
    weighted, repeated = masked_bce(logits, labels, weights), masked_bce(logits[rows], labels[rows])
    torch.testing.assert_close(weighted, repeated)
    (got,), (expected,) = torch.autograd.grad(weighted, logits), torch.autograd.grad(repeated, logits)
    torch.testing.assert_close(got, expected)
    assert got[2].abs().max() == 0


def test_a_task_whose_observed_labels_weigh_nothing_does_not_dilute_the_others() -> None:
    logits, labels = torch.randn(4, 2), torch.tensor([[1.0, 1.0], [0.0, NAN], [1.0, NAN], [0.0, 0.0]])
    weights = torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(masked_bce(logits, labels, weights), masked_bce(logits[1:3, :1], labels[1:3, :1]))
    assert masked_bce(logits, labels, torch.zeros(4)).item() == 0
