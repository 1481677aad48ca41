# SPDX-License-Identifier: Apache-2.0
"""The committed table of the fastest implementations by device, op, dtype and size: ``paths.json``, written by ``make tune``.

::

    {"cpu": {"rms_norm": {"float32": {"7": "cpu", "9": "native"}}}}

A size is that of the op's first tensor, in powers of four: bucket n holds those from 4^n elements on, below 4^(n+1). A bucket that was not
measured takes the nearest one that was, of two the smaller.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

FILE = Path(__file__).with_name("paths.json")
Table = Mapping[str, Mapping[str, Mapping[str, Mapping[str, str]]]]


@cache
def table() -> Table:
    """The table as it was committed."""
    read: Table = json.loads(FILE.read_text(encoding="utf-8"))
    return read


def bucket(elements: int) -> int:
    """The whole part of the logarithm to the base four; 0 for none."""
    return max(elements.bit_length() - 1, 0) // 2


def look_up(device: str, op: str, dtype: torch.dtype, wanted: int) -> str | None:
    """What the table says for a `bucket` of sizes; None where it says nothing of the op in this dtype."""
    measured = table().get(device, {}).get(op, {}).get(str(dtype).removeprefix("torch."))
    if not measured:
        return None
    return measured.get(str(wanted)) or measured[min(measured, key=lambda known: (abs(int(known) - wanted), int(known)))]


def fingerprint() -> str:
    """A hash of the table: two runs with the same one take the same ways."""
    return hashlib.sha256(json.dumps(table(), sort_keys=True).encode()).hexdigest()[:16]
