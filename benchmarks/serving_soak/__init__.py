# SPDX-License-Identifier: Apache-2.0
"""Does a server stay as it is, in memory and in latency, for two hours at 70% of what it can do?

A real server over a small registry answers ``/v1/recommend`` in an open loop (Poisson arrivals; latencies count from when a request was
due) at 70% of the capacity that a closed loop found just before. One request in ten posts an event in its place. Twelve times in a run,
every ten minutes in two hours, the other of two versions is promoted, and loaded, since the former one is let go before. Every ten seconds
a line is noted: resident memory of the server, p50, p99, errors. The first quarter warms up. The slope of memory is Theil and Sen's over
the rest, a share of its median; the drift of p99 is that of the last quarter over the second.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.stats import theilslopes

from benchmarks.frame import Check, Result
from benchmarks.serving.load import encoded
from benchmarks.serving.servers import Running
from benchmarks.serving_soak.load import Client, Seen, Windows, capacity
from benchmarks.serving_soak.server import HOME, MODEL, registry_at, running
from benchmarks.worker import ROOT
from recsys.evaluation.figure import COLOURS, svg
from recsys.registry import Registry

MINUTES, QUICK_MINUTES = 120.0, 2.0
SHARE = 0.7
EVENT_EVERY = 10
USERS = 2000
WINDOW = 10.0
PROMOTIONS = 12
PICTURE = ROOT / ".cache" / "serving_soak" / "soak.svg"
_CLIENTS, _CAPACITY_SECONDS, _MOST_CAPACITY_SHARE = 8, 20.0, 0.1


@dataclass(frozen=True)
class Line:
    """One window.

    Attributes:
        minute: at its end, since the load began.
        rss: bytes.
        p50: seconds; p99 likewise.
        answered: requests with status 200.
        less: of them, those that a rung of the ladder answered.
        errors: all other requests, by status.
    """

    minute: float
    rss: int
    p50: float
    p99: float
    answered: int
    less: int
    errors: dict[int, int]


@dataclass
class Course:
    """A soak so far.

    Attributes:
        rate: requests a second that are offered.
        lines: the windows.
        windows: what was seen in each.
        promotions: minutes of them.
    """

    rate: float
    lines: list[Line]
    windows: list[Seen]
    promotions: list[float]


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    return soak(QUICK_MINUTES if quick else MINUTES)


def soak(minutes: float, home: Path = HOME, picture: Path = PICTURE, options: Sequence[str] = ()) -> Result:
    """Soak a server for so long; after Ctrl-C, for as long as it was.

    Args:
        minutes: of load.
        home: of the registry.
        picture: where the SVG goes, and the server's log beside it.
        options: further ones of the server.
    """
    registry = registry_at(home)
    course = Course(0.0, [], [], [])
    keep = 60 * minutes / PROMOTIONS / 2
    with running(home, picture.with_name("server.log"), "--keep-previous-seconds", f"{keep:.0f}", *options) as server:
        try:
            asyncio.run(_soaked(course, server, registry, minutes))
        except KeyboardInterrupt:
            Console(stderr=True).print(f"interrupted after {course.lines[-1].minute if course.lines else 0:.1f} minutes")
    result = result_of(course, minutes)
    if course.lines:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_text(drawn(course), encoding="utf-8")
    return result


async def _soaked(course: Course, server: Running, registry: Registry, minutes: float) -> None:
    client, asked = Client(server.port), requests()
    found = await capacity(client, asked, _CLIENTS, min(_CAPACITY_SECONDS, _MOST_CAPACITY_SHARE * 60 * minutes))
    course.rate = SHARE * found
    seen, began = Windows(), time.monotonic()
    end = began + 60 * minutes
    load = asyncio.create_task(client.offer(asked, course.rate, 0, seen, end))
    promotions = asyncio.create_task(_promoted(course, registry, began, minutes))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("soak", total=60 * minutes)
            while (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(WINDOW, left))
                _note(course, seen.turn(), (time.monotonic() - began) / 60, server.resident())
                last = course.lines[-1]
                told = f"{last.rss / 1e6:,.0f} MB, p99 {1000 * last.p99:.1f} ms, {sum(last.errors.values())} errors"
                progress.update(bar, completed=time.monotonic() - began, description=told)
        await load
        await client.drain()
    finally:
        load.cancel()
        promotions.cancel()


def _note(course: Course, ended: Seen, minute: float, rss: int) -> None:
    line = Line(round(minute, 3), rss, ended.percentile(50), ended.percentile(99), len(ended.seconds), ended.less, ended.errors)
    course.lines.append(line)
    course.windows.append(ended)


async def _promoted(course: Course, registry: Registry, began: float, minutes: float) -> None:
    """Every now and then the other version: a rollback of a rollback."""
    for number in itertools.count(1):
        await asyncio.sleep(max(0.0, began + number * 60 * minutes / PROMOTIONS - time.monotonic()))
        await asyncio.to_thread(registry.rollback, MODEL, reason="a soak")
        course.promotions.append((time.monotonic() - began) / 60)


def requests() -> Iterator[bytes]:
    """Bodies of users in turn, with an event in the place of every tenth."""
    rng = np.random.default_rng(0)
    run_id = f"{time.time_ns():x}"
    for number in itertools.count():
        user = str(int(rng.integers(USERS)))
        if number % EVENT_EVERY == 0:
            now = datetime.now(UTC).isoformat()
            body = {"event_id": f"{run_id}-{number}", "user_id": user, "item_id": str(int(rng.integers(1, 50))), "time": now}
            yield encoded("/v1/events", json.dumps({**body, "values": {"rating": 5}}).encode())
        else:
            yield encoded("/v1/recommend", json.dumps({"user_id": user, "k": 10, "explain": False}).encode())


def slope(minutes: Sequence[float], values: Sequence[float]) -> float:
    """Percent of the median an hour, by the median of the slopes of all pairs (Theil and Sen); NaN for less than two values."""
    if len(values) < 2:
        return float("nan")
    found = theilslopes(values, np.asarray(minutes) / 60)
    return float(100 * found.slope / np.median(values))


def drift(windows: Sequence[Seen]) -> float:
    """By how many percent p99 of the last quarter is above that of the second; NaN where one has no answers."""
    quarter = len(windows) // 4
    second, last = ([s for w in some for s in w.seconds] for some in (windows[quarter : 2 * quarter], windows[len(windows) - quarter :]))
    if not second or not last:
        return float("nan")
    return float(100 * (np.percentile(last, 99) / np.percentile(second, 99) - 1))


def result_of(course: Course, minutes: float) -> Result:
    """The table by quarters, and the checks."""
    lines = course.lines
    warm = lines[len(lines) // 4 :]
    grows = slope([line.minute for line in warm], [line.rss for line in warm])
    errors = sum(sum(line.errors.values()) for line in lines)
    answered = sum(line.answered for line in lines)
    rows = [_row(name, part) for name, part in _quarters(lines)]
    note = f"{lines[-1].minute if lines else 0:.1f} of {minutes:g} minutes at {course.rate:.0f} requests a second"
    checks = [
        Check("soak_memory_percent_an_hour", round(grows, 3), at_most=1.0, note=f"{note}; the first quarter is left out"),
        Check("soak_p99_drift_percent", round(drift(course.windows), 2), at_most=5.0, note="the last quarter over the second"),
        Check("soak_errors", errors, at_most=0, note=f"of {answered + errors:,} requests, beside {len(course.promotions)} promotions"),
    ]
    details = {"minutes": minutes, "rate": course.rate, "promotions": course.promotions, "lines": [asdict(line) for line in lines]}
    return Result("serving_soak", rows, checks, details)


def _quarters(lines: Sequence[Line]) -> list[tuple[str, Sequence[Line]]]:
    quarter = len(lines) // 4
    if quarter == 0:
        return [("all", lines)] if lines else []
    cuts = [0, quarter, 2 * quarter, len(lines) - quarter, len(lines)]
    return [(name, lines[a:b]) for name, a, b in zip(("first", "second", "third", "last"), cuts, cuts[1:], strict=False) if b > a]


def _row(name: str, lines: Sequence[Line]) -> dict[str, Any]:
    return {
        "quarter": name,
        "memory, MB": f"{np.median([line.rss for line in lines]) / 1e6:,.0f}",
        "p50, ms": round(1000 * float(np.median([line.p50 for line in lines])), 1),
        "p99, ms": round(1000 * float(np.median([line.p99 for line in lines])), 1),
        "answered": sum(line.answered for line in lines),
        "by a rung": sum(line.less for line in lines),
        "errors": sum(sum(line.errors.values()) for line in lines),
    }


def drawn(course: Course) -> str:
    """Memory and latencies over time as SVG; lines where another version was promoted."""

    def draw(panels: Sequence[Axes]) -> None:
        minutes = [line.minute for line in course.lines]
        left, right = panels
        left.plot(minutes, [line.rss / 1e6 for line in course.lines], color=COLOURS[0], lw=1.2)
        left.set_title("resident memory, MB")
        right.plot(minutes, [1000 * line.p99 for line in course.lines], color=COLOURS[1], lw=1.2, label="p99")
        right.plot(minutes, [1000 * line.p50 for line in course.lines], color=COLOURS[0], lw=1.2, label="p50")
        right.set_title("latency from when a request was due, ms")
        right.legend(frameon=False)
        for panel in panels:
            panel.set_xlabel("minutes")
            for minute in course.promotions:
                panel.axvline(minute, color=COLOURS[2], lw=0.6, alpha=0.5)

    return svg(draw, columns=2, size=(10, 3.2))
