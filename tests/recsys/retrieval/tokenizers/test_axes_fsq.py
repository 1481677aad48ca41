# SPDX-License-Identifier: Apache-2.0
"""FSQ of principal axes, against scikit-learn's axes, and what it keeps of likeness beside slices."""

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import AxesFSQ, SlicedFSQ

COUNT, WIDTH = 600, 16


def features(count: int = COUNT, seed: int = 0) -> Tensor:
    """What matters lies along a few axes that are no dimensions."""
    random = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))
    return torch.randn(count, WIDTH, generator=random) * torch.linspace(3.0, 0.1, WIDTH) @ turned + 2.0


def table(text: Tensor) -> ItemTable:
    return ItemTable(len(text), torch.ones(len(text), dtype=torch.bool), text)


def fitted(**options: object) -> AxesFSQ:
    return AxesFSQ(AxesFSQ.Config(**{"slots": 3, "levels": (5, 4), **options})).fit(table(features()))


def test_coordinates_are_those_of_whitened_principal_components() -> None:
    other = features(50, seed=1)
    expected = PCA(6, whiten=True).fit(features().numpy()).transform(other.numpy())
    found = fitted().coordinates(other).flatten(1)
    ratio = torch.from_numpy(expected) / found
    sign = ratio.sign()
    # scikit-learn divides by n - 1.
    torch.testing.assert_close(found * sign * ((COUNT - 1) / COUNT) ** 0.5, torch.from_numpy(expected), rtol=1e-3, atol=1e-3)
    assert bool((sign == sign[0]).all())


def test_codes_number_the_levels_of_a_slots_axes_strongest_first() -> None:
    tokenizer = fitted()
    assert tokenizer.level_sizes == (20, 20, 20)
    codes = tokenizer.encode(table(features()))
    first = tokenizer.coordinates(features())[:, 0, 0]
    level = codes[:, 0] % 5
    assert [bool((first[level == one].max() <= first[level == one + 1].min()).item()) for one in range(4)] == [True] * 4
    assert tokenizer.deviation.diff().max() <= 0


def test_decoding_is_the_mean_of_what_fell_into_the_levels() -> None:
    tokenizer, text = fitted(slots=8, levels=(9, 9)), features()
    codes = tokenizer.encode(table(text))
    decoded = tokenizer.decode(codes)
    assert float((decoded - text).square().mean() / (text - text.mean(0)).square().mean()) < 0.05
    coordinates, again = (tokenizer.coordinates(x).flatten(1) for x in (text, decoded))
    chosen = codes[:, 0] % 9 == 4
    torch.testing.assert_close(again[chosen, 0], coordinates[chosen, 0].mean().expand(int(chosen.sum())), rtol=1e-4, atol=1e-4)


def test_it_keeps_more_of_likeness_than_slices_of_as_many_numbers() -> None:
    text = features()
    sliced = SlicedFSQ(SlicedFSQ.Config(slots=2, levels=(5, 5), heads=2, layers=1, epochs=30, learning_rate=1e-3)).fit(table(text))
    ours = AxesFSQ(AxesFSQ.Config(slots=2, levels=(5, 5))).fit(table(text))

    def agreement(decoded: Tensor) -> float:
        """How often the nearest neighbour by what codes stand for is among the ten nearest by the texts."""
        nearest = torch.cdist(text, text).fill_diagonal_(torch.inf).topk(10, largest=False).indices
        own = torch.cdist(decoded, decoded).fill_diagonal_(torch.inf).argmin(1, keepdim=True)
        return float((nearest == own).any(1).float().mean())

    assert agreement(ours.decode(ours.encode(table(text)))) > 1.2 * agreement(sliced.decode(sliced.encode(table(text))))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="slots: expected at most 8 of 2 axes for features of width 16, got 9"):
        fitted(slots=9)
    flat = features()
    flat[:, 3:] = 0
    with pytest.raises(DataError, match="vary along at least 6 axes, got 3"):
        AxesFSQ(AxesFSQ.Config(slots=3, levels=(5, 4))).fit(table(flat))
