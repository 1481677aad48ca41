# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss
from torch import nn

from recsys.ranking.heads import Towers
from recsys.ranking.losses import masked_bce
from recsys.ranking.token_ranker import MeanReadout

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
