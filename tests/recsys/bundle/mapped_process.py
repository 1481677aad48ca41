# SPDX-License-Identifier: Apache-2.0
"""A process that loads a bundle, reads every row of its ranker's tables, says how much memory that took, and waits for a line."""

import gc
import json
import re
import sys
from pathlib import Path

import torch

from recsys.bundle.bundle import Bundle
from recsys.core import components


def memory() -> dict[str, int]:
    """Bytes that are this process's own, and all that are resident."""
    sizes = {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M)}
    return {"private": sizes["Private_Clean"] + sizes["Private_Dirty"], "resident": sizes["Rss"]}


def main(directory: str, mmap: str) -> None:
    """Load, read, report."""
    for kind in ("ranker", "retriever", "index", "calibration"):
        components.names(kind)  # which imports what is registered: code that is loaded is not what is measured
    before = memory()
    bundle = Bundle.load(Path(directory), mmap=json.loads(mmap))
    rows = sum(len(weight) for weight in bundle.ranker.tables.parameters() if torch.isfinite(weight.sum()))
    gc.collect()
    print(json.dumps({name: size - before[name] for name, size in memory().items()} | {"rows": rows}), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
