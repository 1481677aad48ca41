# SPDX-License-Identifier: Apache-2.0
"""What a candidate is judged by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.core.files import read_json

Comparison = Mapping[str, Mapping[str, float]]
"""``{metric: {"estimate", "low", "high"}}``, candidate minus champion on the same events, with a paired interval. A metric on one slice
has the name that `slice_metric` gives, and ``events`` beside its interval."""


@dataclass(frozen=True)
class Evidence:
    """What gates look at.

    Attributes:
        directory: the candidate, a bundle.
        metrics: what was measured of it, nested, as its ``metrics.json`` holds it.
        comparison: with the champion; None while there is no champion.
        champion: the champion's bundle; None while there is no champion.
        measured: what the promotion itself measured on this machine, see `recsys.registry.gates.measuring.measure`.
    """

    directory: Path
    metrics: Mapping[str, Any]
    comparison: Comparison | None = None
    champion: Path | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        directory: Path,
        comparison: Comparison | None = None,
        champion: Path | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> "Evidence":
        """The evidence on a bundle, with the metrics that it holds."""
        return cls(directory, read_json(directory / "metrics.json"), comparison, champion, measured or {})


def slice_metric(slice_: str, metric: str) -> str:
    """The name in a `Comparison` of a metric on one slice."""
    return f"slices.{slice_}.{metric}"
