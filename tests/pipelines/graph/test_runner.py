# SPDX-License-Identifier: Apache-2.0
"""What runs again, and what does not: on random graphs, with partitions, after failures, kills, and beside another run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.graph import Context, Graph, Outcome, Runner, State, Step, StepError, status
from recsys.core.errors import ConfigError, DataError
from tests.pipelines.graph.toys import NoCode, Toys, contents

ROOT = Path(__file__).parents[3]
DAYS = tuple(f"2024-03-0{day}" for day in range(1, 6))


def make(toys: Toys, recipe: dict, home: Path, *targets: str, **options) -> list[Outcome]:
    graph = toys.graph()
    return Runner(graph, recipe, home, code=NoCode()).run(targets or [step.name for step in graph.steps], **options)


def random_needs(random: np.random.Generator, count: int) -> dict[str, list[str]]:
    names = [f"s{place}" for place in range(count)]
    return {name: [other for other in names[:place] if random.random() < 0.35] for place, name in enumerate(names)}


def behind(needs: dict[str, list[str]], name: str) -> set[str]:
    found = {name}
    for other, its in needs.items():
        if found.intersection(its):
            found.add(other)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_a_change_runs_exactly_what_depends_on_it(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    needs = random_needs(random, int(random.integers(2, 9)))
    toys, recipe = Toys(needs), {}
    make(toys, recipe, tmp_path)
    assert toys.ran == {(name, None): 1 for name in needs}
    for _ in range(4):
        toys.ran.clear()
        make(toys, recipe, tmp_path)
        assert not toys.ran
        changed = str(random.choice(list(needs)))
        if random.random() < 0.5:
            recipe[changed] = recipe.get(changed, 0) + 1
        else:
            toys.sources[f"{changed} None"] = float(random.random())
        make(toys, recipe, tmp_path)
        assert toys.ran == {(name, None): 1 for name in behind(needs, changed)}


@pytest.mark.parametrize("seed", range(6))
def test_equal_content_stops_the_wave(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    needs = random_needs(random, 8)
    constant = frozenset(name for name in needs if random.random() < 0.4)
    toys = Toys(needs, constant=constant)
    make(toys, {}, tmp_path)
    toys.ran.clear()
    toys.sources["s0 None"] = 1.0
    make(toys, {}, tmp_path)
    reached, changed = {"s0"}, {"s0"}
    for name, its in needs.items():
        if changed.intersection(its):
            reached.add(name)
            if name not in constant:
                changed.add(name)
    assert toys.ran == {(name, None): 1 for name in reached}


def test_going_back_to_what_was_runs_nothing(tmp_path: Path) -> None:
    toys = Toys({"a": [], "b": ["a"]})
    for value in (1, 2):
        make(toys, {"a": value}, tmp_path)
    toys.ran.clear()
    make(toys, {"a": 1}, tmp_path)
    assert not toys.ran


def test_only_what_a_target_needs_runs(tmp_path: Path) -> None:
    toys = Toys({"a": [], "b": ["a"], "c": ["a"], "d": ["b"]})
    make(toys, {}, tmp_path, "d")
    assert set(toys.ran) == {("a", None), ("b", None), ("d", None)}


def test_the_code_is_part_of_the_key(tmp_path: Path) -> None:
    toys, code = Toys({"a": [], "b": ["a"]}), NoCode()
    steps = Graph(tuple(replace(step, code=(step.name,)) for step in toys.graph().steps))
    Runner(steps, {}, tmp_path, code=code).run(["b"])
    toys.ran.clear()
    code.versions["a"] = "1"
    Runner(steps, {}, tmp_path, code=code).run(["b"])
    assert toys.ran == {("a", None): 1}, "a wrote the same, so nothing is new for b"
    code.versions["b"] = "1"
    Runner(steps, {}, tmp_path, code=code).run(["b"])
    assert toys.ran == {("a", None): 1, ("b", None): 1}


def test_force_makes_again_what_is_there(tmp_path: Path) -> None:
    toys = Toys({"a": [], "b": ["a"]})
    make(toys, {}, tmp_path)
    outcomes = make(toys, {}, tmp_path, "b", force=("a",))
    assert toys.ran == {("a", None): 2, ("b", None): 1}
    assert [(each.step, each.ran) for each in outcomes] == [("a", True), ("b", False)]


def test_only_refuses_to_make_what_is_needed(tmp_path: Path) -> None:
    toys = Toys({"a": [], "b": ["a"]})
    with pytest.raises(StepError, match="a: it is needed, but not there"):
        make(toys, {}, tmp_path, "b", only=True)
    make(toys, {}, tmp_path, "a")
    make(toys, {}, tmp_path, "b", only=True)
    assert toys.ran == {("a", None): 1, ("b", None): 1}


def test_a_failure_keeps_what_was_finished_and_the_next_run_goes_on(tmp_path: Path) -> None:
    broken = [True]
    runs: list[str] = []

    def step(name: str, *needs: str) -> Step:
        def run(context: Context) -> None:
            runs.append(name)
            (context.out / "half").write_text("half")
            (context.work / "left").write_text("for later")
            if name == "b" and broken[0]:
                raise DataError("no")
            assert name != "b" or (context.work / "left").exists()

        return Step(name, run, needs, code=(__name__,))

    graph = Graph((step("a"), step("b", "a"), step("c", "b")))
    with pytest.raises(DataError, match="no"):
        Runner(graph, {}, tmp_path, code=NoCode()).run(["c"])
    assert not list((tmp_path / "steps" / "b").iterdir())
    assert len(list((tmp_path / "work" / "b").glob("*/left"))) == 1
    broken[0] = False
    Runner(graph, {}, tmp_path, code=NoCode()).run(["c"])
    assert runs == ["a", "b", "b", "c"]
    assert not list((tmp_path / "work").glob("*/*/"))


def test_a_result_that_does_not_stand_is_made_again_and_replaced(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    runs: list[int] = []

    def run(context: Context) -> None:
        runs.append(1)
        outside.write_text("there")
        (context.out / "n").write_text(str(len(runs)))

    def stands(_: object, home: Path, result: Path) -> str | None:
        assert (result / "n").is_file() and home == tmp_path.resolve()
        return None if outside.exists() else "outside is gone"

    graph = Graph((Step("a", run, code=(__name__,), stands=stands),))
    for _ in range(2):
        Runner(graph, {}, tmp_path, code=NoCode()).run(["a"])
    assert len(runs) == 1
    outside.unlink()
    (found,) = status(Runner(graph, {}, tmp_path, code=NoCode()), ["a"])
    assert (found.state, found.why) == (State.STALE, "outside is gone")
    (made,) = Runner(graph, {}, tmp_path, code=NoCode()).run(["a"])
    assert (made.result.directory / "n").read_text() == "2"


def test_a_source_that_changes_under_a_step_is_an_error_and_no_result(tmp_path: Path) -> None:
    source = [1]

    def run(context: Context) -> None:
        (context.out / "n").write_text(str(source[0]))
        source[0] += source[0] < 2

    graph = Graph((Step("a", run, code=(__name__,), sources=lambda *_: source[0]),))
    with pytest.raises(StepError, match="a: what it reads from outside changed while it ran"):
        Runner(graph, {}, tmp_path, code=NoCode()).run(["a"])
    assert not list((tmp_path / "steps" / "a").iterdir())
    (made,) = Runner(graph, {}, tmp_path, code=NoCode()).run(["a"])
    assert (made.result.directory / "n").read_text() == "2"


def test_a_result_of_another_key_in_its_place_is_an_error(tmp_path: Path) -> None:
    toys = Toys({"a": []})
    (made,) = make(toys, {}, tmp_path)
    record = made.result.directory / "step.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"key": "0" * 64}))
    with pytest.raises(StepError, match="the key is 0000"):
        make(toys, {}, tmp_path)
    record.write_text("{")
    with pytest.raises(StepError, match="not a record"):
        make(toys, {}, tmp_path)


# --- partitions

PARTITIONED = {"ingest": [], "validate": ["ingest"], "splits": ["ingest", "validate"], "train": ["splits"], "aside": []}


def partitioned(days: tuple[str, ...] = DAYS) -> Toys:
    return Toys(PARTITIONED, frozenset({"ingest", "validate"}), days=days, looks_back=2)


def test_late_data_of_a_day_runs_that_day_and_what_reads_all_days(tmp_path: Path) -> None:
    toys = partitioned()
    make(toys, {}, tmp_path)
    assert toys.ran == {
        **{(name, day): 1 for name in ("ingest", "validate") for day in DAYS},
        **{(name, None): 1 for name in ("splits", "train", "aside")},
    }
    toys.ran.clear()
    toys.sources["ingest 2024-03-03"] = "late"
    make(toys, {}, tmp_path)
    assert toys.ran == {("ingest", DAYS[2]): 1, ("validate", DAYS[2]): 1, ("splits", None): 1, ("train", None): 1}
    trained = [text for name, text in contents(tmp_path).items() if name.startswith("train/")]
    assert len(trained) == 2 and sum("late" in text for text in trained) == 1


def test_a_new_day_runs_itself_and_what_reads_all_days(tmp_path: Path) -> None:
    toys = partitioned(DAYS[:4])
    make(toys, {}, tmp_path)
    toys.ran.clear()
    toys.days = DAYS
    make(toys, {}, tmp_path)
    assert toys.ran == {("ingest", DAYS[4]): 1, ("validate", DAYS[4]): 1, ("splits", None): 1, ("train", None): 1}


def test_a_backfill_runs_a_range_of_days_and_sees_the_days_before(tmp_path: Path) -> None:
    toys = partitioned()
    make(toys, {}, tmp_path, "validate", partitions=DAYS[1:4])
    assert toys.ran == {(name, day): 1 for name in ("ingest", "validate") for day in DAYS[1:4]}
    assert [toys.seen_before["validate", day] for day in DAYS[1:4]] == [[], [DAYS[1]], [DAYS[1], DAYS[2]]]
    with pytest.raises(ConfigError, match="'splits' has no partitions"):
        make(toys, {}, tmp_path, "splits", partitions=DAYS[:1])
    with pytest.raises(DataError, match="partition '2024-04-01' is not there: there are 5, 2024-03-01 to 2024-03-05"):
        make(toys, {}, tmp_path, "ingest", partitions=("2024-04-01",))


def test_only_wants_all_days_of_a_step_that_reads_them(tmp_path: Path) -> None:
    toys = partitioned()
    make(toys, {}, tmp_path, "validate", partitions=DAYS[:4])
    with pytest.raises(StepError, match="ingest 2024-03-05: it is needed"):
        make(toys, {}, tmp_path, "splits", only=True)


# --- status


def test_status_says_which_part_of_the_key_differs(tmp_path: Path) -> None:
    toys, code = partitioned(), NoCode()

    def states(recipe: dict) -> dict[tuple[str, str | None], tuple[State, str]]:
        found = status(Runner(toys.graph(), recipe, tmp_path, code=code), list(PARTITIONED))
        return {(each.step, each.partition): (each.state, each.why) for each in found}

    assert states({})["ingest", DAYS[0]] == (State.MISSING, "")
    assert states({})["train", None] == (State.MISSING, "after splits")
    make(toys, {}, tmp_path)
    assert set(states({}).values()) == {(State.FRESH, "")}
    toys.sources["ingest 2024-03-03"] = "late"
    late = states({})
    assert late["ingest", DAYS[2]] == (State.STALE, "sources")
    assert late["validate", DAYS[2]] == (State.STALE, "after ingest")
    assert late["ingest", DAYS[1]] == late["aside", None] == (State.FRESH, "")
    assert states({"train": 3})["train", None] == (State.STALE, "recipe: value; after splits")
    make(toys, {}, tmp_path, "ingest", partitions=DAYS[2:3])
    assert states({})["validate", DAYS[2]] == (State.STALE, "input ingest")
    make(toys, {}, tmp_path, "validate", partitions=DAYS[2:3])
    assert states({})["splits", None] == (State.STALE, "input ingest.2024-03-03; input validate.2024-03-03")
    code.versions["tests.pipelines.graph.toys"] = "1"
    assert states({})["aside", None] == (State.STALE, "code")
    assert not any(path.name == "train" for path in (tmp_path / "work").glob("*/*/"))


# --- graphs


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"a": ["b"], "b": ["c"], "c": ["a"], "d": []}, "a, b, c need each other in a circle"),
        ({"a": ["a"]}, "a need each other in a circle"),
        ({"ingest": [], "b": ["ingset"]}, "step 'b' needs 'ingset': unknown step 'ingset'; did you mean 'ingest'"),
    ],
)
def test_a_graph_that_cannot_be_run_is_refused(needs: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Toys(needs).graph()


def test_two_steps_of_one_name_are_refused() -> None:
    step = Toys({"a": []}).graph().steps[0]
    with pytest.raises(ConfigError, match="'a' is there twice"):
        Graph((step, step))


# --- processes

CHILD = """
import json, os, sys, time
from pathlib import Path
from pipelines.graph import Context, Graph, Runner, Step

home, log = Path(sys.argv[1]), Path(sys.argv[2])

def step(name, *needs):
    def run(context):
        with log.open("a") as stream:
            stream.write(name + "\\n")
        for place in range(20):
            done = context.work / str(place)
            if name == "b" and not done.exists():
                (context.out / "half").write_text("h" * 100)
                time.sleep(float(os.environ.get("PAUSE", "0")))
                done.write_text("x")
        read = "".join((each / "out").read_text() for each in context.inputs.values())
        (context.out / "out").write_text(name + read)
        (context.out / "half").unlink(missing_ok=True)
    return Step(name, run, needs, code=("pipelines.graph.step",))

Runner(Graph((step("a"), step("b", "a"), step("c", "b"))), {}, home).run(["c"])
"""


def child(home: Path, log: Path, pause: float) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PAUSE": str(pause), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(home), str(log)], env=environment, cwd=ROOT)


def wait_for(log: Path, line: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if log.exists() and line in log.read_text().split():
            return
        time.sleep(0.02)
    raise AssertionError(f"{line} never began")


@pytest.mark.parametrize("moment", [0.0, 0.3])
def test_a_killed_run_leaves_nothing_half_and_goes_on(moment: float, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = child(tmp_path / "home", log, 0.2)
    wait_for(log, "b")
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    results = [path for path in (tmp_path / "home" / "steps").glob("*/*") if not path.name.startswith(".")]
    assert [path.parent.name for path in results] == ["a"]
    assert all((path / "step.json").is_file() for path in results)
    assert child(tmp_path / "home", log, 0).wait() == 0
    assert log.read_text().split() == ["a", "b", "b", "c"]
    assert child(tmp_path / "whole", tmp_path / "other", 0).wait() == 0
    assert contents(tmp_path / "home") == contents(tmp_path / "whole")
    assert not list((tmp_path / "home").glob("steps/*/.*")) and not list((tmp_path / "home").glob("work/*/*/"))


def test_two_runs_at_once_share_the_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [child(tmp_path / "home", log, 0.02) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(log.read_text().split()) == ["a", "b", "c"]
    assert sorted(path.parent.name for path in (tmp_path / "home" / "steps").glob("*/*")) == ["a", "b", "c"]


def test_where_locks_are_not_seen_the_faster_result_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.graph.store.fcntl.flock", lambda *_: None)
    faster = tmp_path / "faster"
    runs: list[int] = []

    def run(context: Context) -> None:
        runs.append(1)
        (context.out / "n").write_text("same")
        if len(runs) == 1:
            Runner(graph, {}, faster, code=NoCode()).run(["a"])

    graph = Graph((Step("a", run, code=(__name__,)),))
    monkeypatch.setattr(Path, "rename", _taken_first(faster, Path.rename))
    (made,) = Runner(graph, {}, tmp_path / "home", code=NoCode()).run(["a"])
    assert len(runs) == 2 and (made.result.directory / "n").read_text() == "same"
    assert [path.name for path in (tmp_path / "home" / "steps" / "a").iterdir()] == [made.result.directory.name]


def _taken_first(apart: Path, rename: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
    """A rename before which somebody else, in the moment after the place was found free, takes the name."""

    def late(self: Path, target: Path) -> Path:
        if self.name.endswith(".new") and apart not in target.parents and not target.exists():
            shutil.copytree(next(each for each in (apart / "steps" / "a").iterdir() if not each.name.startswith(".")), target)
        return rename(self, target)

    return late
