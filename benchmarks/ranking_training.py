# SPDX-License-Identifier: Apache-2.0
"""How many samples a second does a ranker train, beside the same model of other libraries, and how well does it do after equally many rows?

Synthetic data of Criteo's shape (13 dense columns, 26 tables of 100,000 rows of width 16), in-memory batches of 4,096, one step of warm-up,
then steps counted; contestants in processes of their own, asked in turns, so that each of our figures has a peer's beside it. Quality is
AUC and log-loss on 100,000 held-out rows after one pass over a million (``--quick``: 65,536) with planted labels. ``share_of_bound`` is
the time of the tables' look-ups and updates plus the time of the step's matrix products, each run alone, over the time of the step.
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
THREADS = 2
# name → environment, script, arguments
CONTESTANTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dcnv2": ("ours", "ours.py", ("dcnv2",)),
    "dcnv2_compiled": ("ours", "ours.py", ("dcnv2_compiled",)),
    "rechub_dcnv2": ("rechub", "rechub.py", ("dcnv2",)),
    "fuxictr_dcnv2": ("fuxictr", "fuxi.py", ()),
    "dlrm": ("ours", "ours.py", ("dlrm",)),
    "dlrm_compiled": ("ours", "ours.py", ("dlrm_compiled",)),
    "torchrec_dlrm": ("ours", "torchrec_dlrm.py", ()),
    "tokenmixer_large": ("ours", "ours.py", ("tokenmixer_large",)),
    "rechub_deepfm": ("rechub", "rechub.py", ("deepfm",)),
}
# check → ours (the better of the two), peer, bound
RATIOS = {
    "dcnv2_over_torch_rechub": (("dcnv2", "dcnv2_compiled"), "rechub_dcnv2", 3.0),
    "dcnv2_over_fuxictr": (("dcnv2", "dcnv2_compiled"), "fuxictr_dcnv2", 3.0),
    "dlrm_dcn_over_torchrec_fused": (("dlrm", "dlrm_compiled"), "torchrec_dlrm", 2.0),
    "samples_per_second_beside_rechub_dcnv2": (("tokenmixer_large",), "rechub_dcnv2", 3.0),
    "samples_per_second_beside_rechub_deepfm": (("tokenmixer_large",), "rechub_deepfm", 3.0),
}
TOLERANCE = 0.0005  # of the log-loss after equal samples


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    pairs, steps, rows = (5, 3, 1 << 16) if quick else (7, 5, 1 << 20)
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with contestants(CONTESTANTS) as workers:
        for _ in track(range(pairs), "speed, in turns"):
            for name, worker in workers.items():
                speeds[name].append(worker.ask(do="time", steps=steps)["samples_per_second"])
        bound = {name: workers[name].ask(do="bound", steps=steps) for name in ("dcnv2", "dlrm")}
    quality = {}
    for name in track([name for name in CONTESTANTS if not name.endswith("_compiled")], "quality"):
        with contestants([name]) as workers:
            quality[name] = workers[name].ask(do="train", rows=rows)
    return _result(speeds, quality, bound)


@contextmanager
def contestants(names: Any) -> Iterator[dict[str, Worker]]:
    """Fresh contestants."""
    with ExitStack() as stack:
        workers = {}
        for name in names:
            environment, script, arguments = CONTESTANTS[name]
            workers[name] = stack.enter_context(Worker(name, python_of(environment), HERE / script, *arguments, threads=THREADS))
        yield workers


def _result(speeds: dict[str, list[float]], quality: dict[str, dict[str, Any]], bound: dict[str, dict[str, Any]]) -> Result:
    checks = []
    for name, (ours, peer, least) in RATIOS.items():
        best = max((ratio(speeds[one], speeds[peer]) for one in ours), key=lambda found: found.low)
        checks.append(best.at_least(name, least))
    for ours, peer in (("dcnv2", "rechub_dcnv2"), ("dcnv2", "fuxictr_dcnv2"), ("dlrm", "torchrec_dlrm")):
        excess = quality[ours]["logloss"] - quality[peer]["logloss"]
        note = "log-loss after equal rows, ours less theirs"
        checks.append(Check(f"logloss_{ours}_above_{peer}", round(excess, 5), at_most=TOLERANCE, note=note))
    shares = {name: found["share"] for name, found in bound.items()}
    worst = min(shares, key=lambda name: float(shares[name]))
    checks.append(Check("share_of_bound", round(shares[worst], 3), at_least=0.5, note=f"{worst}, eager; the lesser of {shares}"))
    rows = [
        {
            "model": name,
            "samples/s, median": sorted(values)[len(values) // 2],
            "over DCNv2 of torch-rechub": str(ratio(values, speeds["rechub_dcnv2"])) if name != "rechub_dcnv2" else "",
            "AUC": quality[name]["auc"] if name in quality else "",
            "log-loss": quality[name]["logloss"] if name in quality else "",
        }
        for name, values in speeds.items()
    ]
    return Result("ranking_training", rows, checks, {"speeds": speeds, "quality": quality, "bound": bound})
