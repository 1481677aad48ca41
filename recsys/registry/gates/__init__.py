# SPDX-License-Identifier: Apache-2.0
"""Gates: the conditions that a bundle must hold before it goes live. They are run by the promotion, not by whoever asks for it.

A gate is data, of one of the kinds below; a figure that is not there, or is no number, fails its gate.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from recsys.registry.evidence import Evidence
from recsys.registry.gates.bound import AgainstChampion, Bound
from recsys.registry.gates.calibration import CalibrationBand
from recsys.registry.gates.compatibility import SchemaCompatibility
from recsys.registry.gates.result import GateResult, lookup
from recsys.registry.gates.served import LatencyBudget, ParityBound
from recsys.registry.gates.slices import SliceFloors

__all__ = [
    "AgainstChampion",
    "Bound",
    "CalibrationBand",
    "Gate",
    "GateResult",
    "LatencyBudget",
    "ParityBound",
    "SchemaCompatibility",
    "SliceFloors",
    "lookup",
    "run_gates",
]

Gate = Annotated[
    Bound | AgainstChampion | SliceFloors | CalibrationBand | LatencyBudget | ParityBound | SchemaCompatibility,
    Field(discriminator="kind"),
]


def run_gates(gates: Sequence[Gate], evidence: Evidence) -> list[GateResult]:
    """Run every gate; the candidate passes where every result has.

    Comparisons with a champion have no result while there is none.
    """
    return [result for gate in gates for result in gate.judge(evidence)]
