# SPDX-License-Identifier: Apache-2.0
"""Record requests with everything that they were answered from, and answer them again elsewhere.

Each request is answered alone, so that it is computed as it was when it was recorded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.bundle.golden import Golden, Recorded
from recsys.core.errors import BundleError
from recsys.inference.features import FeatureReader
from recsys.inference.recommender import Recommender
from recsys.inference.recorded import RecordedReader, row_of
from recsys.inference.request import Request, Response

TOLERANCE = 1e-3
"""By how much a score may differ on another kind of machine, where sums are made in another order."""


@dataclass(frozen=True)
class GoldenReport:
    """How recorded requests were answered here.

    Attributes:
        requests: how many.
        moved: how many places hold another item than was recorded.
        largest_difference: between the recorded score and that of the same place; 0 means equal to the bit.
    """

    requests: int
    moved: int
    largest_difference: float

    @property
    def exact(self) -> bool:
        """Whether every item and every bit of every score is as recorded."""
        return self.moved == 0 and self.largest_difference == 0


def record(recommender: Recommender, requests: Sequence[Request]) -> Golden:
    """Answer requests, and keep them with their lists and with the features that were read.

    Raises:
        ValueError: there are no requests.
    """
    if not requests:
        raise ValueError("golden: expected at least one request, got none")
    listening = _Listening(recommender.features)
    watched = Recommender(recommender.bundle, listening)
    recorded = tuple(_recorded(request, _alone(watched, request)) for request in requests)
    return Golden(recorded, {service: _distinct(pa.concat_tables(tables)) for service, tables in listening.heard.items()})


def check(recommender: Recommender, tolerance: float = TOLERANCE) -> GoldenReport | None:
    """Answer the recorded requests of a bundle from their recorded features; None where it has none.

    An item may stand in another place only where the scores of the places are equal within the tolerance.

    Args:
        recommender: of the bundle; its own features are not read.
        tolerance: the largest difference of a score that passes; 0 for the recorded bits.

    Raises:
        BundleError: names the request and the place where the answer is another one.
    """
    golden = recommender.bundle.golden
    if golden is None:
        return None
    replaying = Recommender(recommender.bundle, RecordedReader(golden.features))
    moved, largest = 0, 0.0
    for number, expected in enumerate(golden.requests):
        answer = _alone(replaying, Request(user_id=expected.user_id, k=expected.k, at=expected.at))
        places, difference = _compare(f"golden request {number}", answer, expected, tolerance)
        moved, largest = moved + places, max(largest, difference)
    return GoldenReport(len(golden.requests), moved, largest)


def _compare(where: str, answer: Response, expected: Recorded, tolerance: float) -> tuple[int, float]:
    """How many places hold another item, and the largest difference of a score."""
    if len(answer.items) != len(expected.item_ids):
        raise BundleError(f"{where}: {len(answer.items)} items, but {len(expected.item_ids)} were recorded")
    scores = np.array([item.score for item in answer.items], np.float32)
    differences = np.abs(scores - np.array(expected.scores, np.float32))
    moved = np.array([item.item_id != recorded for item, recorded in zip(answer.items, expected.item_ids, strict=True)], bool)
    wrong = ~(differences <= tolerance) | (moved & (tolerance == 0))
    if wrong.any():
        place = int(np.argmax(wrong))
        found, kept = answer.items[place], f"{expected.item_ids[place]!r} at {expected.scores[place]!r}"
        raise BundleError(f"{where}: place {place}: {found.item_id!r} at {found.score!r}, but recorded was {kept}")
    return int(moved.sum()), float(differences.max(initial=0))


class _Listening:
    """A reader that keeps what another one gave."""

    def __init__(self, reader: FeatureReader) -> None:
        self._reader = reader
        self.heard: dict[str, list[pa.Table]] = {}

    def read(self, service: str, spine: pa.Table) -> pa.Table:
        table = self._reader.read(service, spine)
        self.heard.setdefault(service, []).append(table)
        return table


def _alone(recommender: Recommender, request: Request) -> Response:
    (response,) = recommender.recommend([request])
    return response


def _recorded(request: Request, response: Response) -> Recorded:
    items = response.items
    return Recorded(
        user_id=request.user_id,
        k=request.k,
        at=request.at,
        item_ids=tuple(item.item_id for item in items),
        scores=tuple(item.score for item in items),
    )


def _distinct(table: pa.Table) -> pa.Table:
    """Each entity and time once."""
    return table.take(pa.array(sorted(row_of(table).values()))).combine_chunks()
