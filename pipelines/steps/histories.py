# SPDX-License-Identifier: Apache-2.0
"""What retrievers are trained and measured on: the catalogue, and the users' histories."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipelines.steps.prepared import Prepared
from recsys.data.sequences import EvaluationSteps, SequenceData, evaluation_steps
from recsys.evaluation.retrieval import slices
from recsys.retrieval.catalogue import Catalogue

VALIDATION_STEPS = 2000  # of the validation period, drawn by seed; 600 chose the wrong epoch (docs/results/quickstart.md)


@dataclass(frozen=True)
class Histories:
    """Everything that retrievers are trained and measured on."""

    catalogue: Catalogue
    data: SequenceData
    train: SequenceData
    valid: EvaluationSteps
    test: EvaluationSteps

    @cached_property
    def warm(self) -> Tensor:
        """bool ``[N]``: the items that occur in the training period."""
        return torch.from_numpy(self.train.occurring(self.catalogue.snapshot().count))

    def slices(self) -> dict[str, np.ndarray]:
        """Which test targets are of which kind, see `recsys.evaluation.retrieval.slices`."""
        return slices(self.data, self.train, self.test, self.catalogue.snapshot().count)


def build_histories(prepared: Prepared) -> Histories:
    """The catalogue of all items, and the users' histories with the steps of each period."""
    catalogue = Catalogue(prepared.dataset.items.column("item_id"))
    data = SequenceData.from_events(prepared.events, catalogue.rows)
    split, end = prepared.split, prepared.end
    return Histories(
        catalogue=catalogue,
        data=data,
        train=data.before(split.valid_start),
        valid=evaluation_steps(data, split.valid_start, split.test_start),
        test=evaluation_steps(data, split.test_start, end),
    )
