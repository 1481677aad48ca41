# SPDX-License-Identifier: Apache-2.0
"""Planted impressions: the shares of the logit's variance, the bounds, the batches, and a loader that goes on where it stood."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss as sk_log_loss
from sklearn.metrics import roc_auc_score

from recsys.core.errors import DataError
from recsys.data.batch import RankingBatch
from recsys.scaling.bounds import bounds, expected_auc, expected_log_loss
from recsys.scaling.data import PlantedData, PlantedLoader
from recsys.scaling.planted import BLOCK, PARTS, Impressions, Planted, Shares

SHARES = Shares(main=0.25, pairwise=0.1, high_order=0.15, token_wise=0.2, token_pairs=0.15, sequence=0.15)
HISTORY = {"shares": SHARES, "history": 6, "items": 40}
SMALL = {"fields": 6, "groups": 3, "cardinality": (5, 12), "valid": 500, "test": 700, "reference": 1000}


@pytest.mark.parametrize("factors", ["normal", "sign"])
def test_each_part_explains_its_share_and_parts_are_uncorrelated(factors: str) -> None:
    config = Impressions(**HISTORY, factors=factors, logit_std=1.3)
    parts = Planted(config).rows(0, 24 * BLOCK).parts
    covariance = np.cov(parts.T) / config.logit_std**2
    expected = SHARES.as_array()
    # A heavy tail of rare values leaves a few percent; the share is exact in expectation.
    np.testing.assert_allclose(np.diag(covariance), expected, rtol=0.1)
    correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.abs(correlation - np.eye(len(PARTS))).max() < 0.03
    assert np.abs(parts.mean(axis=0)).max() < 0.02


def test_the_variances_are_exact_by_enumeration() -> None:
    """Every combination of values with its probability, in place of a sample."""
    config = Impressions(fields=6, groups=3, cardinality=(3, 4), latent=2, dense=0, pairs=4, products=3)
    planted = Planted(config)
    grids = np.meshgrid(*[np.arange(n) for n in planted.cardinalities], indexing="ij")
    values = np.stack([grid.ravel() for grid in grids])
    weight = np.prod([p[v] for p, v in zip(planted.frequencies, values, strict=True)], axis=0)
    assert weight.sum() == pytest.approx(1)
    count = values.shape[1]
    empty = np.zeros((count, 0))
    parts = planted._parts(values, empty, np.zeros(count, int), empty.astype(int), np.zeros(count, int))[:, :5]
    np.testing.assert_allclose(weight @ parts, 0, atol=1e-10)
    np.testing.assert_allclose((parts * weight[:, None]).T @ parts, np.eye(5), atol=1e-10)
    # Within a group there is no main effect left: the mean is 0 whatever the value of a field.
    for field, p in enumerate(planted.frequencies):
        for value in range(len(p)):
            there = values[field] == value
            assert abs(weight[there] @ parts[there, 3]) < 1e-10
    # Nor in a pair of groups anything of one group alone: the mean is 0 whatever all its values are.
    for group in planted.groups:
        _, own = np.unique(values[list(group)], axis=1, return_inverse=True)
        assert np.abs(np.bincount(own.ravel(), weight * parts[:, 4])).max() < 1e-10


def test_a_row_is_the_same_whatever_is_drawn_with_it() -> None:
    planted = Planted(Impressions(**HISTORY))
    rows = planted.rows(BLOCK - 10, 30)
    alone = planted.rows(BLOCK + 5, 3)
    for name in ("values", "dense", "candidate", "events", "lengths", "labels", "parts"):
        np.testing.assert_array_equal(getattr(rows[15:18], name), getattr(alone, name))
    assert not np.array_equal(Planted(Impressions(**HISTORY, seed=1)).rows(BLOCK + 5, 3).values, alone.values)


def test_values_follow_their_frequencies_and_labels_their_probabilities() -> None:
    planted = Planted(Impressions())
    rows = planted.rows(0, 12 * BLOCK)
    for field, p in enumerate(planted.frequencies):
        assert p.sum() == pytest.approx(1) and p.min() > 0
        counts = np.bincount(rows.values[:, field], minlength=len(p)) / len(rows.labels)
        assert np.abs(counts - p).max() < 5 * math.sqrt(0.25 / len(rows.labels))
    probability = planted.probabilities(rows)
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        chosen = (probability >= low) & (probability < high)
        error = math.sqrt(0.25 / chosen.sum())
        assert abs(rows.labels[chosen].mean() - probability[chosen].mean()) < 4 * error


@pytest.mark.parametrize("ties", [False, True])
def test_expected_auc_is_that_of_all_pairs(ties: bool) -> None:
    random = np.random.default_rng(0)
    p, s = random.random(60), random.random(60)
    if ties:
        s = s.round(1)
    won = total = 0.0
    for i in range(60):
        for j in range(60):
            if i != j:
                weight = p[i] * (1 - p[j])
                total += weight
                won += weight * ((s[i] > s[j]) + 0.5 * (s[i] == s[j]))
    assert expected_auc(p, s) == pytest.approx(won / total, abs=1e-12)


def test_bounds_agree_with_drawn_labels_and_no_score_passes_them() -> None:
    planted = Planted(Impressions(**HISTORY))
    found = bounds(planted, 0, 10 * BLOCK)
    rows = planted.rows(0, 10 * BLOCK)
    probability = planted.probabilities(rows)
    drawn = roc_auc_score(rows.labels, probability)
    assert abs(found["auc"].value - drawn) < 0.007
    assert abs(found["log_loss"].value - sk_log_loss(rows.labels, probability)) < 0.008
    assert expected_log_loss(np.array([0.0, 1.0])) == 0
    for part in PARTS:
        assert found[f"without_{part}"].value < found["auc"].value - 0.005
    assert found["only_main"].value < found["without_sequence"].value
    assert 0 < found["auc"].error < 0.003 and 0 < found["ne"].value < 1
    assert expected_auc(probability, probability + np.random.default_rng(1).normal(0, 0.1, len(probability))) < found["auc"].value


def test_the_error_of_a_bound_is_that_of_other_samples() -> None:
    planted = Planted(Impressions(fields=8, groups=4, cardinality=(10, 20)))
    samples = [bounds(planted, start * 4 * BLOCK, 2 * BLOCK)["auc"] for start in range(12)]
    spread = np.std([sample.value for sample in samples], ddof=1)
    assert 0.5 < spread / np.mean([sample.error for sample in samples]) < 2


def test_batches_hold_what_was_drawn() -> None:
    data = PlantedData(PlantedData.Config(**SMALL, **HISTORY))
    rows = data.planted.rows(7, 50)
    batch = data.batch(rows)
    spec = data.spec
    assert batch.sparse.keys() == list(spec.bag_keys) and batch.sequences.keys() == list(spec.sequence_keys)
    for field, key in enumerate(spec.bag_keys):
        np.testing.assert_array_equal(batch.sparse[key].values().numpy() - 2, rows.values[:, field])
    items, ages = batch.sequences["history_item"], batch.sequences["history_age"]
    np.testing.assert_array_equal(batch.sequences["item"].values().numpy() - 2, rows.candidate)
    for row, (events, age) in enumerate(zip(items.to_dense(), ages.to_dense(), strict=True)):
        length = rows.lengths[row]
        np.testing.assert_array_equal(events.numpy() - 2, rows.events[row, :length][::-1])  # oldest first
        np.testing.assert_array_equal(age.numpy() - 2, np.arange(length)[::-1])
    for table in spec.tables:
        for key in (*table.bags, *table.sequences):
            values = (batch.sparse[key] if table.bags else batch.sequences[key]).values()
            assert values.min() >= 2 and values.max() < table.rows
    assert set(spec.fields) == {field for group in spec.groups.values() for field in group}


def flat(batches: list[RankingBatch]) -> torch.Tensor:
    return torch.cat([torch.cat([batch.dense, batch.labels], dim=1) for batch in batches if batch.labels is not None])


@pytest.mark.parametrize("rows", [100, BLOCK, 2 * BLOCK + 77])
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(rows: int) -> None:
    data = PlantedData(PlantedData.Config(**SMALL))
    loader = data.train(rows, seed=3, batch_size=300)
    epochs = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) and [len(batch) for batch in batches[:-1]] == [300] * (len(batches) - 1)
        epochs.append(flat(batches))
    expected = torch.from_numpy(data.planted.rows(3 << 32, rows).dense)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch[:, 0].numpy()), np.sort(expected[:, 0].numpy()))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_loader_goes_on_with_the_next_row_also_in_other_batches() -> None:
    data = PlantedData(PlantedData.Config(**SMALL))
    whole = data.train(2 * BLOCK + 77, seed=0, batch_size=500)
    whole.set_epoch(2)
    everything = flat(list(whole))
    for taken in (1, 9, 12):
        first = data.train(2 * BLOCK + 77, seed=0, batch_size=500)
        first.set_epoch(2)
        batches = iter(first)
        seen = flat([next(batches) for _ in range(taken)])
        second = data.train(2 * BLOCK + 77, seed=0, batch_size=333)
        second.load_state_dict(first.state_dict())
        assert torch.equal(torch.cat([seen, flat(list(second))]), everything)


def test_train_and_held_out_rows_are_apart_and_smaller_amounts_are_within_larger_ones() -> None:
    data = PlantedData(PlantedData.Config(**SMALL))
    small, large = (set(flat(list(data.train(rows, 0, 500)))[:, 0].tolist()) for rows in (500, 5000))
    other = set(flat(list(data.train(5000, 1, 500)))[:, 0].tolist())
    valid, test = (set(flat(list(part(300)))[:, 0].tolist()) for part in (data.valid, data.test))
    assert small < large and (len(valid), len(test)) == (500, 700)
    for a, b in ((large, other), (large, valid), (large, test), (valid, test)):
        assert len(a & b) <= 2  # of continuous values, in float32


def test_the_fingerprint_is_what_decides_batches() -> None:
    one, more = (PlantedData(PlantedData.Config(**SMALL | {"reference": n})).fingerprint for n in (1000, 2000))
    assert one == more != PlantedData(PlantedData.Config(**SMALL, seed=1)).fingerprint


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shares": {"main": 0.9}}, "expected a sum of 1"),
        ({"shares": SHARES}, "there is no history"),
        ({"cardinality": (20, 10)}, "fewest <= most"),
        ({"cardinality": (3, 10), "latent": 3}, "fewer factors"),
        ({"fields": 8, "groups": 5}, "at least two fields"),
        ({"groups": 2}, "fields of different groups"),
    ],
)
def test_what_cannot_be_planted_is_an_error(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Impressions(**changed)


def test_bad_amounts_are_errors() -> None:
    data = PlantedData(PlantedData.Config(**SMALL))
    with pytest.raises(DataError, match="at least 1"):
        PlantedLoader(data, 0, 0, seed=0, batch_size=10)
    with pytest.raises(DataError, match="at most"):
        data.train(1 << 33, 0, 10)
