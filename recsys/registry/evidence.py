# SPDX-License-Identifier: Apache-2.0
"""What a promotion is decided on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """What gates look at.

    Attributes:
        directory: the candidate's bundle.
        metrics: the candidate's metrics, nested.
        comparison: ``{metric: {"estimate", "low", "high"}}``, candidate minus champion on the same events; None if there was no champion.
        champion: the champion's bundle; None if there is no champion.
        measured: what the promotion itself measured on this machine.
    """

    directory: Path
    metrics: Mapping[str, Any]
    comparison: Mapping[str, Mapping[str, float]] | None
    champion: Path | None
    measured: Mapping[str, Any]
