# SPDX-License-Identifier: Apache-2.0
"""How fast are lists made over a live catalogue, and what does a constraint cost? Four parts, each in a file of its own.

- `tokens`: TIGER's codes one after another, beside transformers' ``generate`` on the same weights, with the same results.
- `sets`: all slots at once beside one after another, against the operations saved.
- `gathers`: the scores of all items of a large catalogue, and lists of them.
- `live`: recall and speed of indexes of vectors when few items are live.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.catalogue_decoding import gathers, live, sets, tokens
from benchmarks.frame import Check, Result, threads

THREADS = 2
_PARTS: dict[str, Callable[[bool], tuple[list[dict[str, Any]], list[Check]]]] = {
    "tokens": tokens.measure,
    "sets": sets.measure,
    "gathers": gathers.measure,
    "live": live.measure,
}


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    with threads(THREADS):
        found = {name: part(quick) for name, part in _PARTS.items()}
    checks = [check for _, own in found.values() for check in own]
    rows = [{"part": name, "measured": _text(row)} for name, (own, _) in found.items() for row in own]
    return Result("catalogue_decoding", rows, checks, {name: own for name, (own, _) in found.items()})


def _text(row: dict[str, Any]) -> str:
    values = {name: f"{value:,.3g}" if isinstance(value, float) else value for name, value in row.items() if value != ""}
    return ", ".join(f"{name} {value}" for name, value in values.items())
