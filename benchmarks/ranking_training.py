# SPDX-License-Identifier: Apache-2.0
"""How fast does a ranker train beside torch-rechub's DCNv2 and DeepFM, and is it as good after as many rows?

Synthetic data of Criteo's shape, one in-memory batch of 4096, one step of warm-up, then steps counted; contestants in processes of their
own, asked in turns, so that each of our figures has a peer's beside it. Quality is AUC and log-loss on 100,000 held-out rows after one pass
over a million (``--quick``: 65,536) with planted labels.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.frame import Check, Result, ratio
from benchmarks.peers import python_of
from benchmarks.worker import Worker
from recsys.training.progress import track

HERE = Path(__file__).parent / "ranking_contest"
OURS, PEERS = "tokenmixer_large", ("rechub_dcnv2", "rechub_deepfm")
THREADS = 2


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    pairs, steps, rows = (5, 3, 1 << 16) if quick else (7, 5, 1 << 20)
    speeds: dict[str, list[float]] = {name: [] for name in (OURS, *PEERS)}
    with _contestants() as workers:
        for _ in track(range(pairs), "speed, in turns"):
            for name, worker in workers.items():
                speeds[name].append(worker.ask(do="time", steps=steps)["samples_per_second"])
    with _contestants() as workers:
        quality = {name: workers[name].ask(do="train", rows=rows) for name in track(list(workers), "quality")}
    return _result(speeds, quality)


@contextmanager
def _contestants() -> Iterator[dict[str, Worker]]:
    """Fresh contestants, ours first."""
    with ExitStack() as stack:
        workers = {OURS: Worker(OURS, python_of("ours"), HERE / "ours.py", threads=THREADS)}
        for peer in PEERS:
            workers[peer] = Worker(peer, python_of("rechub"), HERE / "rechub.py", peer.removeprefix("rechub_"), threads=THREADS)
        for worker in workers.values():
            stack.enter_context(worker)
        yield workers


def _result(speeds: dict[str, list[float]], quality: dict[str, dict[str, Any]]) -> Result:
    ratios = {peer: ratio(speeds[OURS], speeds[peer]) for peer in PEERS}
    rows = [
        {
            "model": name,
            "samples/s, median": sorted(values)[len(values) // 2],
            "ours / it": "" if name == OURS else str(ratios[name]),
            "rows": quality[name]["rows"],
            "AUC": quality[name]["auc"],
            "log-loss": quality[name]["logloss"],
        }
        for name, values in speeds.items()
    ]
    best_peer = min(quality[peer]["logloss"] for peer in PEERS)
    checks = [ratios[peer].at_least(f"samples_per_second_beside_{peer}", 3.0) for peer in PEERS]
    excess = quality[OURS]["logloss"] - best_peer
    checks.append(Check("logloss_above_best_peer", round(excess, 5), at_most=0.0, note="equal or better quality after equal rows"))
    return Result("ranking_training", rows, checks, {"speeds": speeds, "quality": quality})
