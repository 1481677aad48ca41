# SPDX-License-Identifier: Apache-2.0
"""Turning the kernels on leaves the losses of every retriever that trains where the references have them."""

import pytest
import torch

from recsys.data.batch import SequenceBatch
from tests.recsys.retrieval.coded import N, batch_of
from tests.recsys.retrieval.saving import MODELS, build
from tests.recsys.training.courses import assert_same_course

QUICK = ("recgpt",)
LENGTHS = (3, 0, 6, 1, 5)


def drawn(seed: int) -> SequenceBatch:
    random = torch.Generator().manual_seed(seed)

    def items(count: int) -> list[int]:
        found: list[int] = torch.randint(0, N, (count,), generator=random).tolist()
        return found

    histories = [items(length) for length in LENGTHS]
    return batch_of(histories, [(row, length, items(1)[0]) for row, length in enumerate(LENGTHS)])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS])
def test_a_training_runs_the_same_course_on_kernels_and_on_references(name: str) -> None:
    ran = {choice.op for choice in assert_same_course(lambda: build(name), [drawn(seed) for seed in range(4)])}
    if name in ("hstu", "recgpt", "sasrec"):
        assert ran == {"jagged_attention", "catalogue_loss"}
