# SPDX-License-Identifier: Apache-2.0
"""The contest: every side in a process of its own, its sums compared, then epochs in turns, then memory in fresh processes."""

import statistics
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.frame import Result
from benchmarks.loader import data
from benchmarks.loader.report import Memory, Speeds, result
from benchmarks.peers import python_of
from benchmarks.worker import Worker
from recsys.training.progress import track

HERE = Path(__file__).parent
# side → environment, script
SIDES = {"ours": ("ours", "ours.py"), "rechub": ("rechub", "rechub.py"), "fuxictr": ("fuxictr", "fuxi.py")}
SAMPLE_SECONDS = 0.02
OUR_PROCESSES = 3


@dataclass(frozen=True)
class Entry:
    """One way of one side.

    Attributes:
        side: of `SIDES`.
        way: of its script.
        batches: how many are timed; None for an epoch.
    """

    side: str
    way: str
    batches: int | None = None

    def __str__(self) -> str:
        return f"{self.side} {self.way}"


OURS = {"encoded": Entry("ours", "encoded"), "raw": Entry("ours", "raw"), "encoded, two cores": Entry("ours", "encoded_ahead")}
RIVALS = {
    "encoded": (Entry("ours", "encoded_in_order"), Entry("rechub", "flat"), Entry("rechub", "in_memory", 8), Entry("fuxictr", "padded")),
    "raw": (Entry("rechub", "raw"), Entry("fuxictr", "raw")),
    "encoded, two cores": (Entry("rechub", "flat"), Entry("fuxictr", "padded")),
}
CORES = {"encoded": 1, "raw": 1, "encoded, two cores": 2}
IN_MEMORY = (
    Entry("ours", "encoded"),
    Entry("ours", "raw"),
    Entry("rechub", "flat"),
    Entry("rechub", "in_memory", 2),
    Entry("fuxictr", "padded"),
)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rows: of the two sizes.
        pairs: of measurements.
    """

    rows: tuple[int, int]
    pairs: int


QUICK = Plan((200_000, 800_000), 5)
FULL = Plan((1_000_000, 8_000_000), 7)


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    plan = QUICK if quick else FULL
    for environment, _ in SIDES.values():
        python_of(environment)  # missed before anything is written
    with tempfile.TemporaryDirectory(prefix="loader") as name:
        folder, source = Path(name), data.Source()
        places = [folder / f"{rows}" for rows in plan.rows]
        for place, rows in zip(places, plan.rows, strict=True):
            data.write(place, rows, source)
        speeds = [compete(what, folder, places[0], plan.pairs) for what in OURS]
        return result(speeds, [memory(entry, folder, places) for entry in track(IN_MEMORY, "memory")], plan.rows)


def compete(what: str, folder: Path, place: Path, pairs: int) -> Speeds:
    """The same sums from everyone, and then rounds of epochs, ours first and last in each.

    Raises:
        RuntimeError: an environment is not there.
        ValueError: a side gives other numbers than ours.
    """
    ours, rivals = OURS[what], RIVALS[what]
    with sides(folder, dict.fromkeys([ours.side, *(entry.side for entry in rivals)]), CORES[what]) as workers:
        if what == "raw":
            for worker in workers.values():
                worker.ask(do="prepare", folder=str(place))
        expected = workers[ours.side].ask(do="sums", way=ours.way, folder=str(place))
        for entry in rivals:
            check_same(str(entry), workers[entry.side].ask(do="sums", way=entry.way, folder=str(place)), expected, raw=what == "raw")
        speeds = Speeds(what, str(ours), rivals={str(entry): [] for entry in rivals})
        for _ in track(range(pairs), f"{what}, in turns"):
            first = _rate(workers, ours, place)
            for entry in rivals:
                speeds.rivals[str(entry)].append(_rate(workers, entry, place))
            speeds.ours.append((first + _rate(workers, ours, place)) / 2)
    return speeds


@contextmanager
def sides(folder: Path, names: Iterable[str], cores: int) -> Iterator[dict[str, Worker]]:
    """Fresh processes, each with a folder of its own that outlives it."""
    pythons = {name: python_of(SIDES[name][0]) for name in names}
    with ExitStack() as stack:
        workers = {}
        for name, python in pythons.items():
            work = folder / "work" / name
            work.mkdir(parents=True, exist_ok=True)
            workers[name] = stack.enter_context(Worker(name, python, HERE / SIDES[name][1], str(work), threads=cores))
        yield workers


def check_same(name: str, found: dict[str, Any], expected: dict[str, Any], *, raw: bool) -> None:
    """Hold that sums over an epoch are ours.

    Args:
        name: for errors.
        found: sums, as `Contestant` gives them.
        expected: ours.
        raw: each side has a numbering of its own, so that only how often ids occur is compared.

    Raises:
        ValueError: one differs; names it.
    """
    ids = "frequencies" if raw else "ids"
    wrong = [key for key in ("rows", "labels") if found[key] != expected[key]]
    wrong += [column for column in expected[ids] if found[ids][column] != expected[ids][column]]
    if not np.allclose(found["dense"], expected["dense"], rtol=1e-5, atol=1e-3):
        wrong.append("dense")
    if wrong:
        raise ValueError(f"{name} gives other numbers than ours over an epoch: {', '.join(wrong)}")


def memory(entry: Entry, folder: Path, places: Sequence[Path]) -> Memory:
    """What an epoch takes at each size, in a fresh process each time: of ours the median of several, since the check is of it."""
    times = OUR_PROCESSES if entry.side == "ours" else 1
    return Memory(str(entry), [int(statistics.median(_taken(entry, folder, places[0], place) for _ in range(times))) for place in places])


def _taken(entry: Entry, folder: Path, small: Path, place: Path) -> int:
    """Bytes of an epoch after one of the smaller size, since what is made or read once is no part of it."""
    with sides(folder, [entry.side], 1) as workers:
        worker = workers[entry.side]
        worker.ask(do="time", way=entry.way, folder=str(small), batches=entry.batches)
        if entry.side == "fuxictr":
            return _tree_peak(worker, entry, place)
        return int(worker.ask(do="memory", way=entry.way, folder=str(place), batches=entry.batches)["bytes"])


def _rate(workers: dict[str, Worker], entry: Entry, place: Path) -> float:
    """Rows a second."""
    answer = workers[entry.side].ask(do="time", way=entry.way, folder=str(place), batches=entry.batches)
    return float(answer["rows"] / answer["seconds"])


def _tree_peak(worker: Worker, entry: Entry, place: Path) -> int:
    """The highest memory of a process and all that it started, above where it stood, looked at every few milliseconds."""
    before = peak = _tree_bytes(worker.pid)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, _tree_bytes(worker.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        worker.ask(do="time", way=entry.way, folder=str(place))
    finally:
        done.set()
        thread.join()
    return peak - before


def _tree_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, what they share divided among them."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total
