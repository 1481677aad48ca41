# SPDX-License-Identifier: Apache-2.0
"""What does a catalogue in several parts cost? The constants with which `docs/scale.md` plans 10⁸ items, measured anew.

- `indexes`: for each kind of index, in a process of its own: seconds of a core to build, bytes of an item, and milliseconds of a core
  for a user.
- `merges`: lists of S parts put together.
- `liveness`: the catalogue itself: ids, bits, and a change of one of them.
- `plan`: what follows for 10⁸ items, by rule of three where a cost is in proportion to the items, and not at all elsewhere.
"""

from typing import Any

from benchmarks.catalogue_shards import indexes, liveness, merges, plan
from benchmarks.frame import Result, threads


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    with threads(1):
        found = {"indexes": indexes.measure(quick), "merges": merges.measure(quick), "liveness": liveness.measure(quick)}
    found["plan"] = plan.rows(found["indexes"], found["merges"], found["liveness"])
    rows = [{"part": name, "measured": _text(row)} for name, own in found.items() for row in own]
    return Result("catalogue_shards", rows, [], found)


def _text(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {f'{value:,.3g}' if isinstance(value, float) else value}" for name, value in row.items())
