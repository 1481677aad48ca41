# SPDX-License-Identifier: Apache-2.0
"""What follows from the constants for a catalogue that no single part holds."""

from collections.abc import Sequence
from typing import Any

ITEMS = 10**8
PARTS = (16, 64)
LINEAR = ("dense", "gather")
"""Kinds that read every item in every search, so that time is in proportion to the items."""


def rows(indexes: Sequence[dict[str, Any]], merges: Sequence[dict[str, Any]], catalogues: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind and number of parts: of one part, and of a whole answer.

    Memory is in proportion to the items for every kind; time where it is `LINEAR`, and None elsewhere. The answer is that of a batch of 64
    users, of whom each waits for the whole batch, by one core of each part; parts work at the same time, and the network is left out.
    """
    return [_row(index, merge, catalogues[-1]) for index in indexes for merge in merges if merge["parts"] in PARTS]


def _row(index: dict[str, Any], merge: dict[str, Any], catalogue: dict[str, Any]) -> dict[str, Any]:
    parts = merge["parts"]
    items = ITEMS / parts
    share = items / index["items"]
    search = 64 * index["64 users, core-ms/user"] * share if index["index"] in LINEAR else None
    return {
        "index": index["index"],
        "parts": parts,
        "index, GB a part": index["bytes/item"] * items / 1e9,
        "catalogue, GB a part": catalogue["bytes/item"] * items / 1e9,
        "build, min a part": index["build, core-s"] * share / 60 if index["index"] in LINEAR else None,
        "search of 64 users, ms": search,
        "merge of 64 users, ms": merge["64 users, core-ms"],
        "one bit, ms": catalogue["one bit, core-ms"] * items / catalogue["items"],
    }
