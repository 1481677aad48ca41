# SPDX-License-Identifier: Apache-2.0
"""Whether clients of the champion can go on with the candidate."""

from collections.abc import Mapping
from typing import Literal

from recsys.bundle.manifest import verify
from recsys.bundle.signature import Signature
from recsys.core.config import Config
from recsys.core.errors import RecsysError
from recsys.registry.evidence import Evidence
from recsys.registry.gates.result import GateResult

_EXPECTED = "nothing that clients use is removed or changed"


class SchemaCompatibility(Config):
    """What a client sends and gets stays as it is with the champion: additions are allowed, removals and changes of type are not.

    Compared are the tasks, the feature services with their entity keys, the columns that requests carry, and the type of item ids.
    The value is the number of fields that break clients.
    """

    kind: Literal["schema"] = "schema"

    def judge(self, evidence: Evidence) -> list[GateResult]:
        """One result; none while there is no champion."""
        if evidence.champion is None:
            return [] if evidence.comparison is None else [_failed("the champion's bundle is not at hand")]
        try:
            ours, theirs = (verify(directory).signature for directory in (evidence.directory, evidence.champion))
        except RecsysError as error:
            return [_failed(str(error))]
        broken, added = breaks(ours, theirs), additions(ours, theirs)
        note = "; ".join(broken) if broken else ", ".join(f"new: {name}" for name in added)
        return [GateResult(gate="schema", passed=not broken, value=float(len(broken)), expected=_EXPECTED, note=note)]


def breaks(ours: Signature, theirs: Signature) -> list[str]:
    """What of ``theirs`` is gone or has another type in ``ours``, a sentence for each field."""
    found = [f"tasks.{task}: is gone" for task in theirs.tasks if task not in ours.tasks]
    found += _changes("services", ours.services, theirs.services, "its entity key")
    found += _changes("request", ours.request, theirs.request, "its type")
    if ours.item_id != theirs.item_id:
        found.append(f"item_id: its type was {theirs.item_id}, is {ours.item_id}")
    return found


def additions(ours: Signature, theirs: Signature) -> list[str]:
    """The fields of ``ours`` that ``theirs`` does not have."""
    found = [f"tasks.{task}" for task in ours.tasks if task not in theirs.tasks]
    found += [f"services.{name}" for name in ours.services if name not in theirs.services]
    return found + [f"request.{name}" for name in ours.request if name not in theirs.request]


def _changes(field: str, ours: Mapping[str, str], theirs: Mapping[str, str], what: str) -> list[str]:
    found = []
    for name, expected in theirs.items():
        if name not in ours:
            found.append(f"{field}.{name}: is gone")
        elif ours[name] != expected:
            found.append(f"{field}.{name}: {what} was {expected}, is {ours[name]}")
    return found


def _failed(note: str) -> GateResult:
    return GateResult(gate="schema", passed=False, value=None, expected=_EXPECTED, note=note)
