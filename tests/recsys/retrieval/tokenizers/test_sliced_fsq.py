# SPDX-License-Identifier: Apache-2.0
from functools import cache

import pytest
import torch
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import SlicedFSQ, health

WIDTH, SLOTS = 32, 4


def table(text: Tensor) -> ItemTable:
    return ItemTable(len(text), torch.ones(len(text), dtype=torch.bool), text)


@cache
def text() -> Tensor:
    """Clusters in a few directions, with small and uneven deviations about a mean that is not zero."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 6, generator=generator) @ torch.randn(6, WIDTH, generator=generator)
    clustered = centres[torch.randint(20, (600,), generator=generator)] + 0.3 * torch.randn(600, WIDTH, generator=generator)
    return clustered * torch.linspace(0.005, 0.08, WIDTH) + 0.1


def new(**options: object) -> SlicedFSQ:
    small = {"slots": SLOTS, "levels": (5, 4, 3), "heads": 2, "layers": 1, "epochs": 25, "batch_size": 64, "learning_rate": 2e-3}
    return SlicedFSQ(SlicedFSQ.Config.model_validate({**small, **options}))


@cache
def fitted() -> tuple[SlicedFSQ, list[float]]:
    losses: list[float] = []
    return new().fit(table(text()), progress=lambda _done, _of, figures: losses.append(figures["loss"])), losses


def test_it_learns() -> None:
    tokenizer, losses = fitted()
    assert losses[-1] < 0.7 * losses[0]
    left = text() - tokenizer.decode(tokenizer.encode(table(text())))
    mean = text() - text().mean(0)
    assert left.abs().sum() < 0.6 * mean.abs().sum(), "the loss that it learns by"
    assert left.square().sum() < 0.5 * mean.square().sum()


@pytest.mark.parametrize(("form", "share"), [("tanh", 0.8), ("sigmoid", 0.6)])
def test_codes_are_used_before_training_already(form: str, share: float) -> None:
    features = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.001, 0.1, WIDTH)
    tokenizer = new(form=form, epochs=1, learning_rate=1e-9).fit(table(features))
    assert min(level.used for level in health(tokenizer.encode(table(features)), tokenizer.level_sizes).levels) > share


def test_a_slice_makes_its_own_code_alone() -> None:
    tokenizer, _ = fitted()
    codes = tokenizer.encode(table(text()))
    part = WIDTH // SLOTS
    for slot in range(SLOTS):
        other = text().clone()
        other[:, slot * part : (slot + 1) * part] = other.flip(0)[:, slot * part : (slot + 1) * part]
        changed = tokenizer.encode(table(other)) != codes
        assert changed[:, slot].float().mean() > 0.5
        changed[:, slot] = False
        assert not bool(changed.any())


def test_every_slot_is_read_when_decoding() -> None:
    tokenizer, _ = fitted()
    codes = tokenizer.encode(table(text()))[:50]
    decoded = tokenizer.decode(codes)
    for slot in range(SLOTS):
        other = codes.clone()
        other[:, slot] = (other[:, slot] + 7) % tokenizer.level_sizes[slot]
        assert bool(((tokenizer.decode(other) - decoded).abs().amax(1) > 1e-5).all())


def test_what_is_decoded_is_what_was_learnt() -> None:
    """Codes alone say as much as the quantised values that training saw."""
    tokenizer, _ = fitted()
    standardised = tokenizer.standardizer(text())
    values, codes = tokenizer.quantise(standardised)
    torch.testing.assert_close(tokenizer.standardizer.inverse(tokenizer.reconstruct(values)), tokenizer.decode(codes))


def test_widths_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"5 slots.*got 32"):
        new(slots=5).fit(table(text()))
    with pytest.raises(ConfigError, match=r"3 heads.*got 32"):
        new(heads=3).fit(table(text()))
