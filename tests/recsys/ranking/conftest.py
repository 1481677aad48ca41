# SPDX-License-Identifier: Apache-2.0
"""Impressions as plain rows, and the batches made of them, so that a test can take rows away and compare."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, SequenceSpec, TableSpec

Row = dict[str, Any]


@pytest.fixture
def groups() -> dict[str, tuple[str, ...]]:
    return {"who": ("user", "age"), "what": ("item", "genres", "popularity"), "past": ("history",)}


@pytest.fixture
def spec(groups: dict[str, tuple[str, ...]]) -> InputSpec:
    return InputSpec(
        tables=(
            TableSpec(name="user", rows=20, bags=("user",)),
            TableSpec(name="genre", rows=8, bags=("genres",)),
            TableSpec(name="item", rows=30, sequences=("seen", "item")),
            TableSpec(name="stars", rows=7, sequences=("seen_stars",)),
        ),
        sequences=(SequenceSpec(name="history", keys=("seen", "seen_stars"), target="item"),),
        dense=("age", "popularity"),
        tasks=("click", "like"),
        groups=groups,
    )


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    def make(lengths: Sequence[int], seed: int = 0) -> list[Row]:
        generator = torch.Generator().manual_seed(seed)

        def draw(high: int, count: int) -> list[int]:
            return torch.randint(0, high, (count,), generator=generator).tolist()

        return [
            {
                "user": draw(20, 1),
                "genres": draw(8, draw(4, 1)[0]),
                "seen": draw(30, length),
                "seen_stars": draw(7, length),
                "item": draw(30, 1),
                "dense": torch.randn(2, generator=generator).tolist(),
                "labels": [float(x) for x in draw(2, 2)],
            }
            for length in lengths
        ]

    return make


@pytest.fixture
def make_batch(spec: InputSpec) -> Callable[[list[Row]], RankingBatch]:
    def keyed(rows: list[Row], keys: tuple[str, ...]) -> KeyedJaggedTensor:
        bags = [row[key] for key in keys for row in rows]
        values = torch.tensor([value for bag in bags for value in bag], dtype=torch.int64)
        return KeyedJaggedTensor(keys=list(keys), values=values, lengths=torch.tensor([len(bag) for bag in bags], dtype=torch.int64))

    def make(rows: list[Row]) -> RankingBatch:
        return RankingBatch(
            sparse=keyed(rows, spec.bag_keys),
            sequences=keyed(rows, spec.sequence_keys),
            dense=torch.tensor([row["dense"] for row in rows]),
            labels=torch.tensor([row["labels"] for row in rows]),
        )

    return make
