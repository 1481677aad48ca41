# SPDX-License-Identifier: Apache-2.0
"""What a second process is worth: one process with one thread beside two with one thread each, on the same global batches.

A TokenMixer-Large over Criteo's shape (13 dense columns, 26 tables of 100,000 rows of width 16, split as TorchRec's planner likes), planted
labels, trained by the trainer under torchrun with gloo, in alternating launches. The time of a step is the median after a few to warm up.
*Communication* is the share of a step's time in which a collective of gloo is under way, and its bytes are those that the first process
gives to collectives, both from PyTorch's profiler over further steps. All launches must come to the same losses. Two launches more have all
tables ``table_wise`` and all ``row_wise``: the bytes that they exchange, over those that `recsys.scaling.communication` derives.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.distributed.worker import TABLES, WIDTH
from benchmarks.frame import Check, Result, mean_interval, ratio
from recsys.core.files import read_json
from recsys.scaling.communication import Placement, Workload, exchanged_bytes
from recsys.training.launch import command, environment
from recsys.training.progress import track

ROOT = Path(__file__).parents[2]
WORLDS = (1, 2)


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    pairs, batch, steps = (5, 1024, 12) if quick else (7, 4096, 30)
    found: dict[int, list[dict[str, Any]]] = {world: [] for world in WORLDS}
    for _ in track(range(pairs), "launches of one and of two processes, in turns"):
        for world in WORLDS:
            found[world].append(_launched(world, batch, steps, None))
    rates = {world: [batch / one["seconds"] for one in found[world]] for world in WORLDS}
    losses = [one["losses"] for world in WORLDS for one in found[world]]
    apart = max(abs(a - b) for other in losses[1:] for a, b in zip(losses[0], other, strict=True))
    derived = [_over_derived(_launched(2, batch, 3, placement), batch, placement) for placement in ("table_wise", "row_wise")]
    rows = [_row(world, rates[world], found[world]) for world in WORLDS]
    return Result(
        "distributed",
        rows,
        [
            Check("loss_apart", apart, at_most=1e-4, note="largest difference of a step's loss between any two launches"),
            ratio(rates[2], rates[1]).at_least("two_over_one", 1.5),
            Check(
                "communication_share",
                round(mean_interval([one["communication"] for one in found[2]])[2], 3),
                at_most=0.3,
                note="upper end; of a step of two processes",
            ),
            Check(
                "bytes_over_derived", round(max(derived), 3), at_most=1.1, note=f"table_wise {derived[0]:.3f}, row_wise {derived[1]:.3f}"
            ),
            Check("derived_over_bytes", round(1 / min(derived), 3), at_most=1.1),
        ],
    )


def _row(world: int, rates: list[float], found: list[dict[str, Any]]) -> dict[str, Any]:
    mean = {name: mean_interval([one[name] for one in found])[0] for name in ("communication", "gib")}
    megabytes = mean_interval([sum(one["given"].values()) * 4 / 1e6 for one in found])[0]
    return {
        "processes": str(world),
        "samples a second": mean_interval(rates)[0],
        "communication": mean["communication"],
        "MB a step and process": megabytes,
        "GiB a process": mean["gib"],
    }


def _over_derived(found: dict[str, Any], batch: int, placement: Placement) -> float:
    """What two processes give to the exchange of ids and vectors, over what is derived for it.

    Derived is what is sent to the other process: half of what an all-to-all is given, and of what the gradients' all-gather gives all;
    for a reduce-scatter gloo has an all-reduce, which is given both halves. The profiler counts numbers, ids among them, as four bytes.
    """
    work = Workload(fields=TABLES, width=WIDTH, batch=batch // 2)
    vectors = 4 * work.batch * work.fields * work.width
    sent = sum(exchanged_bytes(work, 2, placement, number=4))
    kept_at_home = sent if placement == "table_wise" else sent - vectors
    given = 4 * (sum(found["given"].values()) - found["dense"])
    return given / (sent + kept_at_home)


def _launched(world: int, batch: int, steps: int, placement: Placement | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        program = [str(Path(__file__).with_name("worker.py")), folder, json.dumps({"batch": batch, "steps": steps, "placement": placement})]
        variables = {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command(program, world), env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{world} processes ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        result: dict[str, Any] = read_json(Path(folder) / "result.json")
        return result
