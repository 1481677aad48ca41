# SPDX-License-Identifier: Apache-2.0
"""RG-3, EV-7: the parity gate reads the decisions that a bundle made in a server, or else its golden requests, and says which."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from feature_store.online import OnlineReader
from pipelines.cli import main
from pipelines.graph import Runner
from pipelines.pipeline import GRAPH
from pipelines.recipe import Recipe
from pipelines.steps.bundle import bundle_directory
from pipelines.steps.promote import load_release
from recsys.bundle.bundle import Bundle
from recsys.core.config import load_recipe
from recsys.data.encode import Encoder
from recsys.data.encoding.fitted import Fitted
from recsys.decisions.log import DecisionLog
from recsys.decisions.parts import read_decisions
from recsys.registry import Evidence, GateResult, Location, Registry, run_gates
from recsys.registry.gates import ParityBound
from recsys.registry.gates.measuring import measure
from recsys.registry.gates.parity import replay_own
from serving.app import create_app
from serving.decided import Decided
from serving.engine import Engine, Loaded
from tests.pipelines.small import SMALL
from tests.recsys.registry.small import register
from tests.serving.support import KNOWN, Switch, settings, wait_until
from tests.serving.test_process import process, status

GATE = ParityBound(at_most=1e-4)
MODEL = "parity"


@pytest.fixture(scope="module")
def plain(tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose recipe has the gate and no other."""
    bundle = Bundle.load(tiny_run.directory / "bundle")
    recipe = {**bundle.manifest.recipe, "gates": [GATE.model_dump()]}
    directory = tmp_path_factory.mktemp("plain") / "bundle"
    replace(bundle, manifest=bundle.manifest.model_copy(update={"recipe": recipe})).save(directory)
    return directory


@pytest.fixture(scope="module")
def other(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle with another preprocessing of one feature, and nothing that was recorded with it."""
    bundle = Bundle.load(plain)
    fitted = bundle.encoder._fitted
    mean, deviation = fitted.scales["user_mean"]
    encoder = Encoder(
        bundle.encoder.config, Fitted(fitted.vocabularies, fitted.edges, {**fitted.scales, "user_mean": (mean + 1, deviation)})
    )
    manifest = bundle.manifest.model_copy(update={"encoder": encoder.fingerprint()})
    directory = tmp_path_factory.mktemp("other") / "bundle"
    replace(bundle, encoder=encoder, manifest=manifest, golden=None).save(directory)
    return directory


def served(bundle: Bundle, online: OnlineReader, folder: Path) -> None:
    """The decisions of an application over a bundle."""
    decided = Decided(DecisionLog(folder, share=1.0))
    engine = Engine(Switch(v1=lambda: Loaded.of(bundle, online, name=MODEL, version=1)), settings(), on_answer=decided)
    with TestClient(create_app(engine, engine.settings, decided.close)) as client:
        wait_until(lambda: engine.loaded is not None)
        for user in (*KNOWN[:5], "who?"):
            assert client.post("/v1/recommend", json={"user_id": user, "k": 5}).json()["flags"] in ([], ["new_user"])
        assert client.post("/v1/rank", json={"user_id": KNOWN[0], "item_ids": ["5", "50", "99"]}).status_code == 200


def judged(directory: Path, folder: Path | None, gate: ParityBound = GATE) -> GateResult:
    decisions = None if folder is None else partial(replay_own, folder=folder)
    measured = measure((gate,), directory, None, [], decisions)
    (result,) = run_gates((gate,), Evidence.of(directory, measured=measured))
    return result


def test_a_log_that_a_server_wrote_passes_and_the_verdict_names_it(plain: Path, online: OnlineReader, tmp_path: Path) -> None:
    served(Bundle.load(plain), online, tmp_path)
    rows = sum(decision.evidence.candidates.num_rows for decision in read_decisions(tmp_path))
    result = judged(plain, tmp_path)
    assert result.passed and result.value < 1e-5 and result.note == f"{rows} scores of its recorded decisions" and rows > 50


def test_another_preprocessing_than_the_served_one_fails_with_the_figure(
    plain: Path, other: Path, online: OnlineReader, tmp_path: Path
) -> None:
    """The server that answered for the bundle encoded as the plain one does."""
    served(replace(Bundle.load(plain), manifest=Bundle.load(other).manifest, golden=None), online, tmp_path)
    result = judged(other, tmp_path)
    assert not result.passed and result.value > 0.01 and "recorded decisions" in result.note
    assert judged(other, tmp_path, ParityBound(at_most=2 * result.value)).passed, "it is the figure that is judged"


def test_without_decisions_of_its_own_the_golden_requests_are_read(plain: Path, other: Path, online: OnlineReader, tmp_path: Path) -> None:
    bundle = Bundle.load(plain)
    rows = sum(len(request.item_ids) for request in bundle.golden.requests)
    served(Bundle.load(other), online, tmp_path)
    for folder in (None, tmp_path, tmp_path / "nothing there"):
        result = judged(plain, folder)
        assert result.passed and result.note.startswith(f"{rows} scores of requests that the bundle was recorded with, and between the off")
        assert not judged(plain, folder, ParityBound(at_most=1e-4, min_rows=rows + 1)).passed
    # What was recorded of a bundle with another preprocessing is not what this one computes.
    changed = replace(Bundle.load(other), golden=bundle.golden)
    changed.save(tmp_path / "changed")
    result = judged(tmp_path / "changed", None)
    assert not result.passed and result.value > 1e-3 and "recorded with" in result.note


def test_a_difference_without_bound_fails_and_says_so(plain: Path) -> None:
    for source, what in (("decisions", "its recorded decisions"), ("golden", "requests that the bundle was recorded with")):
        measured = {"parity": {"max_difference": "infinity", "rows": 7, "source": source}}
        (result,) = run_gates((GATE,), Evidence.of(plain, measured=measured))
        assert not result.passed and result.value is None and f"7 scores of {what}" in result.note and "no finite difference" in result.note


@pytest.fixture
def home(tiny_run: Any, plain: Path, other: Path, tmp_path: Path) -> Iterator[Path]:
    """A registry with both bundles, as versions 1 and 2 of a model that has no champion."""
    home = Path(shutil.copytree(tiny_run.home, tmp_path / "home"))
    registry = Registry(Location.under(home))
    for directory in (plain, other):
        register(registry, directory, MODEL)
    yield home


def promote(home: Path, version: int, *options: str) -> tuple[int, Any]:
    code = main(["promote", "--home", str(home), "--name", MODEL, str(version), *options])
    return code, Registry(Location.under(home)).log.events(MODEL)[-1]


def test_the_command_takes_a_log(home: Path, plain: Path, other: Path, online: OnlineReader, tmp_path: Path) -> None:
    log = tmp_path / "log"
    served(replace(Bundle.load(plain), manifest=Bundle.load(other).manifest, golden=None), online, log)
    code, event = promote(home, 2, "--decisions", str(log))
    (gate,) = event.gates
    assert (code, event.action, gate["passed"]) == (1, "refuse", False) and gate["value"] > 0.01
    assert event.details["measured"]["parity"]["source"] == "decisions"
    served(Bundle.load(plain), online, log)
    code, event = promote(home, 1, "--decisions", str(log))
    assert (code, event.action, event.details["measured"]["parity"]["source"]) == (0, "promote", "decisions")
    assert event.gates[0]["note"].endswith("scores of its recorded decisions")


def test_the_command_reads_golden_requests_without_a_log(home: Path) -> None:
    code, event = promote(home, 1)
    assert (code, event.details["measured"]["parity"]["source"]) == (0, "golden")


def test_the_step_of_the_pipeline_reads_the_log_that_its_recipe_names(home: Path, online: OnlineReader, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    gates = "gates=[{kind: parity, at_most: 0.0001}]"
    runner = Runner(GRAPH, load_recipe(Recipe, "quickstart", (*SMALL, gates, f"decisions={log}")), home)

    def released(**how: Any) -> tuple[bool, str, Path]:
        places = {each.step: each.result.directory for each in runner.run(["promote"], **how)}
        release = load_release(places["promote"])
        return release["promoted"], release["event"]["details"]["measured"]["parity"]["source"], bundle_directory(places["bundle"])

    promoted, source, directory = released()
    assert (promoted, source) == (True, "golden"), "nobody has asked it anything yet"
    served(Bundle.load(directory), online, log)
    promoted, source, again = released(force=("promote",))
    assert (promoted, source, again) == (True, "decisions", directory)


@pytest.mark.slow  # a process of its own
def test_a_log_of_a_real_server_process_promotes_its_bundle(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--model", f"models:/{MODEL}/1", "--decisions", str(log), "--decision-share", "1", "--grace-seconds", "0")
    with process(home, tmp_path / "server.log", *options) as (server, address):
        wait_until(lambda: status(address) == 200, 180)
        for user in KNOWN[:5]:
            answer = httpx.post(f"{address}/v1/recommend", json={"user_id": user, "deadline_ms": 10_000}, timeout=30, trust_env=False)
            assert answer.status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, (tmp_path / "server.log").read_text()
    code, event = promote(home, 1, "--decisions", str(log))
    assert (code, event.details["measured"]["parity"]["source"]) == (0, "decisions")
    assert event.details["measured"]["parity"]["rows"] > 0 and event.gates[0]["value"] < 1e-5
