# SPDX-License-Identifier: Apache-2.0
"""Does a log that is larger than memory go through ingest, features and the training loader in 4 GiB?

A generated log (100 million events of 2 million users and 500,000 items, both by Zipf; with ``--quick`` 2 million of 100,000 and 20,000) is
ingested in parts, every event gets the features of its user and item as of just before it, and the loader passes over the result once. Each
stage is a process of its own, one task at a time, which may have 4 GiB of data (``RLIMIT_DATA``: an allocation beyond fails); its peak is
what the kernel counted as resident (``VmHWM``). Rows that break a rule are planted, so that it is known how many must come out.

Each finished stage is a line of ``docs/results/raw/larger_than_memory.jsonl``, so that a run that was broken off goes on. A full run that
is finished is shown, not run again; a quick one begins anew. A stage that was broken off goes on, too, and is then marked, since its
seconds are those of the rest.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.larger_than_memory.data import FULL, LIMIT_GIB, QUICK, Size

if TYPE_CHECKING:
    from benchmarks.frame import Result

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "larger_than_memory"
RAW = ROOT / "docs" / "results" / "raw"
STAGES = ("generate", "ingest", "features", "loader")
BOUNDED = STAGES[1:]


def run(*, quick: bool) -> "Result":
    """Run the benchmark, or what is left of it."""
    name = "quick" if quick else "full"
    raw, folder, size = RAW / f"larger_than_memory{'_quick' if quick else ''}.jsonl", CACHE / name, QUICK if quick else FULL
    lines = _lines(raw, size)
    if quick and len(lines) == len(STAGES):
        raw.unlink()
        lines = {}
    if len(lines) < len(STAGES):
        for stage in STAGES:
            if stage not in lines or not (folder / stage).exists():
                shutil.rmtree(folder / stage, ignore_errors=True)
                lines[stage] = _measure(stage, folder, size)
                raw.parent.mkdir(parents=True, exist_ok=True)
                with raw.open("a") as file:
                    file.write(json.dumps(lines[stage]) + "\n")
        shutil.rmtree(folder)
    return _result(lines, size)


def _lines(raw: Path, size: Size) -> dict[str, dict[str, Any]]:
    """The last line of each stage, of this size."""
    found = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    return {line["stage"]: line for line in found if line["size"] == size.as_json()}


def _measure(stage: str, folder: Path, size: Size) -> dict[str, Any]:
    from benchmarks.frame import machine
    from recsys.bundle.environment import code_commit

    # Arrow's own allocator keeps what was freed; with the system's, what is resident is what is used.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-m", "benchmarks.larger_than_memory.stage", stage, str(folder), json.dumps(size.as_json())]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"stage": stage, "size": size.as_json(), **found, "machine": machine(), "commit": code_commit()}


def _result(lines: dict[str, dict[str, Any]], size: Size) -> "Result":
    from benchmarks.frame import Check, Result

    rows = [
        {
            "stage": f"{stage} (gone on with)" if lines[stage].get("begun_before") else stage,
            "rows": f"{lines[stage]['rows']:,}",
            "seconds": round(lines[stage]["seconds"], 1),
            "of a core": round(lines[stage]["cpu_seconds"], 1),
            "rows / s": f"{lines[stage]['rows'] / lines[stage]['seconds']:,.0f}",
            "peak, GiB": round(lines[stage]["peak_bytes"] / 2**30, 2),
            "on disk, GiB": round(lines[stage]["disk_bytes"] / 2**30, 2),
        }
        for stage in STAGES
    ]
    peak = max(lines[stage]["peak_bytes"] for stage in BOUNDED) / 2**30
    lost = size.clean_rows - lines["loader"]["rows"]
    planted = lines["ingest"]["counts"]
    note = f"of {size.clean_rows:,}; ingest dropped {planted} of the {size.planted:,} planted of each"
    wrong = sum(abs(count - size.planted) for count in planted.values())
    checks = [
        Check("larger_than_memory_peak_gib", round(peak, 3), at_most=LIMIT_GIB, note="the highest of ingest, features and loader"),
        Check("rows_lost", lost, at_least=0, at_most=0, note=note),
        Check("planted_rows_miscounted", wrong, at_most=0, note="by the report of ingest"),
    ]
    return Result("larger_than_memory", rows, checks, {"lines": list(lines.values())})
