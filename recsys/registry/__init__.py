# SPDX-License-Identifier: Apache-2.0
"""Which bundle is live, on what evidence, and how back."""

from typing import TYPE_CHECKING

from recsys.registry.events import Entry, Event
from recsys.registry.evidence import Evidence
from recsys.registry.gates import AgainstChampion, Bound, Gate, GateResult, run_gates
from recsys.registry.history import PromotionLog
from recsys.registry.location import Location, home
from recsys.registry.promotion import Override, Registry
from recsys.registry.states import State

if TYPE_CHECKING:
    from recsys.bundle.bundle import Bundle

__all__ = [
    "AgainstChampion",
    "Bound",
    "Entry",
    "Event",
    "Evidence",
    "Gate",
    "GateResult",
    "Location",
    "Override",
    "PromotionLog",
    "Registry",
    "State",
    "home",
    "load",
    "run_gates",
]


def load(uri: str, location: Location | None = None) -> "Bundle":
    """The bundle at ``models:/recsys@champion``, ready for a notebook."""
    bundle, _ = Registry(location or Location.under(home())).load(uri)
    return bundle
