# SPDX-License-Identifier: Apache-2.0
"""Several catalogues side by side, for models that are trained on some and used on others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recsys.core.errors import DataError
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData


@dataclass(frozen=True)
class Domain:
    """Histories over one catalogue.

    Attributes:
        name: stands before the ids of its users when domains are joined.
        data: its events.
        count: rows of its catalogue.
    """

    name: str
    data: SequenceData
    count: int


def joined(domains: Sequence[Domain]) -> SequenceData:
    """All histories over one catalogue, whose rows are those of the first domain, then those of the second, and so on.

    Users are told apart by their domain, ``name:id``. Times stay where all domains have them; else only the order is known.

    Raises:
        DataError: there is no domain, two have the same name, or an event's item is not in its domain's catalogue.
    """
    if not domains:
        raise DataError("domains: expected at least one, got none")
    names = [domain.name for domain in domains]
    if len(set(names)) < len(names):
        raise DataError(f"domains: expected a name of its own for each, got {names}")
    for domain in domains:
        if len(domain.data.items) and not 0 <= domain.data.items.min() <= domain.data.items.max() < domain.count:
            raise DataError(f"domains: {domain.name}: expected rows 0 to {domain.count - 1}, got one of {domain.data.items.max()}")
    rows = np.cumsum([0, *(domain.count for domain in domains)])
    items = np.concatenate([domain.data.items + first for domain, first in zip(domains, rows, strict=False)])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(domain.data.offsets) for domain in domains]))])
    users = [f"{domain.name}:{user}" for domain in domains for user in domain.data.users.to_pylist()]
    times = [domain.data.times for domain in domains]
    if any(time is None for time in times):
        return SequenceData.from_order(users, Jagged(items, offsets))
    return SequenceData(pa.array(users, pa.string()), offsets, items, _steps(domains), np.concatenate([t for t in times if t is not None]))


def _steps(domains: Sequence[Domain]) -> np.ndarray:
    """The steps of all events, those of different domains different."""
    own = [domain.data.steps - domain.data.steps.min(initial=0) for domain in domains]
    firsts = np.cumsum([0, *(steps.max(initial=-1) + 1 for steps in own)])
    return np.concatenate([steps + first for steps, first in zip(own, firsts, strict=False)])
