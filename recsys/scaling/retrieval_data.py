# SPDX-License-Identifier: Apache-2.0
"""What a sweep trains retrievers on: histories of which any share can be drawn, items that are held out, and what is known of items."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from recsys.core.components import component_config
from recsys.core.config import Config
from recsys.core.errors import DataError
from recsys.data.jagged import Jagged, ranges
from recsys.data.sequences import EvaluationSteps, SequenceData
from recsys.data.windows import SequenceLoader
from recsys.retrieval.catalogue import GatherIndex
from recsys.retrieval.codes import ItemCodes
from recsys.retrieval.models.sasrec import SASRec
from recsys.text import ItemText
from recsys.training.trainer import Training


class Collaborative(Config):
    """The model whose item vectors others read: trained once on the same events with the same seed, whatever reads it."""

    model: SASRec.Config
    training: Training


class RetrievalConfig(Config):
    """What all retrieval data have: how events are drawn and cut, and what models may read of items.

    Attributes:
        count: what ``rows`` of a plan and of the axis ``data`` count: users, or events.
        held_out: the share of the items that is drawn to be cold: their events are not trained on.
        seed: of what is drawn once for all cells: items that are held out, steps, and the order of one second's events.
        valid: how many validation steps are drawn; null for all.
        test: how many test steps are drawn; null for all.
        windows: how training histories are cut.
        text: of items; null where no model reads it.
        codes: of items; null where no model reads them.
        collaborative: where SETRec has its collaborative vectors from; null where no model reads them.
        index: by which models of codes are ranked.
    """

    count: Literal["users", "events"] = "users"
    held_out: float = Field(0.0, ge=0, lt=1)
    seed: int = 0
    valid: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)
    windows: SequenceLoader.Config = SequenceLoader.Config()
    text: ItemText | None = None
    codes: ItemCodes | None = None
    collaborative: Collaborative | None = None
    index: component_config("index") = GatherIndex.Config()  # type: ignore[valid-type]


@dataclass(frozen=True, eq=False)
class Split:
    """Events, and which of them train, validate and test.

    Attributes:
        data: all events.
        train: those of training, of the same users.
        valid: the steps of validation; histories are in ``data``.
        test: the steps of the test.
    """

    data: SequenceData
    train: SequenceData
    valid: EvaluationSteps
    test: EvaluationSteps


class RetrievalData(ABC):
    """Histories over a catalogue; a source is a class ``cls(config)`` registered with ``@register("scaling_data", name)``.

    Attributes:
        config: see `RetrievalConfig`.
    """

    config: RetrievalConfig

    @property
    @abstractmethod
    def content(self) -> Mapping[str, Any]:
        """What decides items, events and their split, fit for JSON."""

    @property
    @abstractmethod
    def items(self) -> pa.Table:
        """One line for each catalogue row: ``item_id`` and columns of text."""

    @property
    @abstractmethod
    def whole(self) -> Split:
        """All that there is, before items are held out."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which events train and which steps are measured, fit for JSON."""
        return {
            "content": dict(self.content),
            **self.config.model_dump(mode="json", include={"count", "held_out", "seed", "valid", "test"}),
        }

    @cached_property
    def held_out(self) -> np.ndarray:
        """bool ``[N]``: the items that are never trained on; of a larger share, those of a smaller one and more."""
        count = self.items.num_rows
        held_out = np.zeros(count, bool)
        held_out[np.random.default_rng([self.config.seed, 0]).permutation(count)[: int(self.config.held_out * count)]] = True
        return held_out

    @cached_property
    def split(self) -> Split:
        """Training without the held-out items, validation of the others alone, and the test, with the steps that are drawn of both.

        Held-out items stay in the histories of validation and test: users took them.
        """
        whole, config = self.whole, self.config
        valid = only(whole.valid, ~self.held_out[whole.valid.targets.values])
        steps = {"valid": (valid, config.valid), "test": (whole.test, config.test)}
        drawn = {
            name: found if count is None else found.sample(count, [config.seed, part])
            for part, (name, (found, count)) in enumerate(steps.items(), 1)
        }
        for name, found in drawn.items():
            if not len(found):
                raise DataError(f"{name}: expected at least one step, got none")
        return Split(whole.data, whole.train.where(~self.held_out[whole.train.items]), **drawn)

    def draw(self, rows: int, seed: int) -> SequenceData:
        """The training events of ``rows`` users, or ``rows`` events of as few users as hold them, in the seed's own order of users.

        Fewer rows of one seed are among its more rows. The last user whose events are counted may have the first of them only. Users
        all of whose events are of held-out items count like others, so that their number does not depend on what is held out.

        Raises:
            DataError: there are not so many.
        """
        train, count = self.split.train, self.config.count
        order = np.random.default_rng([seed, 0]).permutation(np.flatnonzero(np.diff(self.whole.train.offsets)))
        lengths = np.diff(train.offsets)[order]
        before = np.cumsum(lengths) - lengths
        there = len(order) if count == "users" else int(lengths.sum())
        if rows > there:
            raise DataError(f"rows: there are {there} training {count}, got {rows}")
        chosen = np.arange(len(order)) < rows if count == "users" else before < rows
        users, lengths, before = order[chosen], lengths[chosen], before[chosen]
        if count == "events":
            lengths = np.minimum(lengths, rows - before)
        ascending = np.argsort(users)
        users, lengths = users[ascending], lengths[ascending]
        drawn = _select(train, ranges(train.offsets[users], lengths), lengths)
        return replace(drawn, users=train.users.take(pa.array(users)))


def only(steps: EvaluationSteps, kept: np.ndarray) -> EvaluationSteps:
    """The steps with those of their targets that a mask keeps, bool ``[targets]``; steps that are left without any are left out."""
    owner = np.repeat(np.arange(len(steps)), np.diff(steps.targets.offsets))
    counts = np.bincount(owner[kept], minlength=len(steps))
    places = np.flatnonzero(counts)
    targets = Jagged(steps.targets.values[kept], np.concatenate([[0], np.cumsum(counts[places])]))
    return replace(steps.take(places), targets=targets)


def _select(data: SequenceData, events: np.ndarray, lengths: np.ndarray) -> SequenceData:
    """These events, so many of each user."""
    times = None if data.times is None else data.times[events]
    return SequenceData(data.users, np.concatenate([[0], np.cumsum(lengths)]), data.items[events], data.steps[events], times)
