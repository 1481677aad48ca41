# SPDX-License-Identifier: Apache-2.0
"""The pipeline's steps: whose code they are, that they read what they say they read, and that a killed training goes on."""

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.graph import Context, Graph, Runner, Step
from pipelines.graph.code import Code
from pipelines.graph.parts import modules_of
from pipelines.pipeline import GRAPH, NAMES
from pipelines.recipe import Recipe
from recsys.core.config import load_recipe
from recsys.data.datasets import Synthetic, load_dataset
from recsys.data.ingest import write_dataset
from tests.pipelines.small import SMALL

ROOT = Path(__file__).parents[2]


def closure(name: str) -> list[str]:
    recipe = load_recipe(Recipe, "quickstart", SMALL)
    step = GRAPH.step(name)
    return Code().closure({*step.modules, *modules_of(step.reads(recipe))})


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_may_hold_is_no_steps_code(name: str) -> None:
    assert not {"pipelines.recipe", "pipelines.pipeline", "pipelines.run"} & set(closure(name))


@pytest.mark.parametrize(
    ("name", "has", "lacks"),
    [
        ("ingest", "recsys.data.datasets.synthetic", ("recsys.ranking", "recsys.retrieval", "feature_store", "kernels")),
        ("features", "feature_store.offline", ("recsys.ranking", "recsys.retrieval", "recsys.data.datasets", "kernels")),
        ("text", "recsys.text.hashing", ("recsys.ranking", "recsys.retrieval", "feature_store", "recsys.data.datasets")),
        ("ranker", "recsys.ranking.models.tokenmixer_large", ("recsys.retrieval", "recsys.text", "recsys.data.datasets")),
        ("collaborative", "recsys.retrieval.models.sasrec", ("recsys.ranking", "recsys.text", "feature_store", "recsys.data.datasets")),
        ("retriever", "recsys.retrieval.models.setrec", ("recsys.ranking", "feature_store", "recsys.data.datasets")),
    ],
)
def test_a_step_is_made_of_its_own_code(name: str, has: str, lacks: tuple[str, ...]) -> None:
    found = closure(name)
    assert has in found
    assert not [module for module in found if module.startswith(lacks)]


def test_a_data_set_that_was_written_anew_is_ingested_anew(tmp_path: Path) -> None:
    recipe = load_recipe(Recipe, "quickstart", (f"dataset={{name: ingested, path: {tmp_path / 'data'}}}", *SMALL[1:]))

    def ingested() -> list[tuple[str, bool]]:
        return [(each.step, each.ran) for each in Runner(GRAPH, recipe, tmp_path / "home").run(["splits"])]

    for seed in (0, 1):
        dataset = load_dataset(Synthetic.Config(users=20, items=30, seed=seed))
        write_dataset(dataset, tmp_path / "data", overwrite=seed > 0)
        assert ingested() == [("ingest", True), ("validate", True), ("splits", True)]
        assert ingested() == [("ingest", False), ("validate", False), ("splits", False)]


# What a step looks at for its notes, hands on unused, or finds in the content of its inputs as well.
NOTES = {"retriever": {"index"}, "evaluate": {"model", "encoder"}, "promote": {"name", "features"}}


@pytest.mark.slow
def test_a_step_reads_no_more_of_the_recipe_than_its_key_holds(tmp_path: Path) -> None:
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    now: list[tuple[str, str]] = []

    class Recording(Recipe):
        def __getattribute__(self, name: str) -> Any:
            if now and name in Recipe.model_fields:
                seen[now[-1]].add(name)
            return super().__getattribute__(name)

    def during(step: str, what: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def called(argument: Any) -> Any:
            now.append((step, what))
            try:
                return call(argument)
            finally:
                now.pop()

        return called

    def recorded(step: Step) -> Step:
        own: Callable[[Context], None] = during(step.name, "run", step.run)
        return replace(step, run=own, reads=during(step.name, "reads", step.reads), code=step.modules)

    recipe = Recording.model_construct(**vars(load_recipe(Recipe, "quickstart", SMALL)))
    Runner(Graph(tuple(map(recorded, GRAPH.steps)), GRAPH.partitions), recipe, tmp_path).run(NAMES)
    for name in set(NAMES) - {"bundle"}:
        assert seen[name, "run"] - seen[name, "reads"] <= NOTES.get(name, set()), name
        assert seen[name, "run"], name


@pytest.mark.slow
def test_a_killed_training_goes_on_from_its_checkpoint_and_ends_the_same(tmp_path: Path) -> None:
    own = (*SMALL, "ranker.training.trainer.epochs=6", "ranker.training.trainer.checkpoint.every_steps=2", "ranker.training.batch_size=64")
    sets = [part for override in own for part in ("--set", override)]

    def start(home: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipelines.cli", "step", "ranker", "--home", str(home), *sets]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)

    process = start(tmp_path / "killed")
    until = time.monotonic() + 300
    while not list((tmp_path / "killed" / "work" / "ranker").glob("*/ranker/checkpoints/step-*/MANIFEST.json")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [path for path in (tmp_path / "killed" / "steps" / "ranker").glob("*") if not path.name.startswith(".")]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "steps").glob("*/**/step.json")}
    assert start(tmp_path / "killed").wait() == 0 and start(tmp_path / "whole").wait() == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "finished steps were not run again"
    (killed,), (whole,) = (list((tmp_path / name / "steps" / "ranker").iterdir()) for name in ("killed", "whole"))
    assert killed.name == whole.name
    for file in ("model/model.safetensors", "scores.safetensors", "calibration.json", "ranking.json"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert not list((tmp_path / "killed" / "work" / "ranker").glob("*/"))
