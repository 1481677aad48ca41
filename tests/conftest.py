# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: single-threaded libraries, Triton's interpreter in a process of its own, no unlisted skip."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

# Before any test imports numpy or torch: two xdist workers on two cores must not each start a pool as wide as the machine.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(variable, "1")

TESTS = Path(__file__).parent
INTERPRETER = TESTS / "kernels" / "interpreter"
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ALLOWED = TESTS / "allowed_skips.txt"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """TRITON_INTERPRET holds for a whole process: with it, only the interpreter's tests are collected; without it, all others."""
    if collection_path.is_dir() and INTERPRETER.is_relative_to(collection_path) and collection_path != INTERPRETER:
        return None
    return True if collection_path.is_relative_to(INTERPRETER) != INTERPRETING else None


def pytest_report_header() -> str:
    """Which of the two processes this is."""
    return f"TRITON_INTERPRET=1 is {'set: only' if INTERPRETING else 'not set: all but'} {INTERPRETER.relative_to(TESTS.parent)}"


def pytest_configure(config: pytest.Config) -> None:
    """The process that writes the report judges the skips; xdist's workers hand theirs over to it."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipGate(read_allowed(ALLOWED)), "skip-gate")


def read_allowed(file: Path) -> list[tuple[str, str]]:
    """The allowed skips: ``node id | part of the reason`` on each line. Blank lines and lines that begin with # are comments."""
    allowed = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        node, separator, reason = (part.strip() for part in line.partition(" | "))
        if not (node and separator and reason):
            raise pytest.UsageError(f"{file}:{number}: expected `node id | part of the reason`, got {line!r}")
        allowed.append((node, reason))
    return allowed


class SkipGate:
    """Fails the session where a test was skipped that the list does not name, or for another reason than it names."""

    def __init__(self, allowed: list[tuple[str, str]]) -> None:
        self.allowed = allowed
        self.unlisted: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._judge(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._judge(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.unlisted:
            terminalreporter.section("skips that tests/allowed_skips.txt does not list", red=True)
            for line in sorted(set(self.unlisted)):
                terminalreporter.write_line(line)

    def _judge(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = " ".join(reason.removeprefix("Skipped: ").split())
        # An entry without parameters stands for the test with any of them.
        names = {report.nodeid, re.sub(r"\[.*\]$", "", report.nodeid)}
        if not any(node in names and part in reason for node, part in self.allowed):
            self.unlisted.append(f"{report.nodeid} | {reason}")


TINY = (
    "dataset={name: synthetic}",
    "text.encoder={name: hashing}",
    "ranker.training.trainer.epochs=2",
    "ranker.training.batch_size=256",
    "ranker.calibration={name: platt}",
    "collaborative.training.trainer.epochs=4",
    "retriever.training.trainer.epochs=4",
    "retriever.model.semantic_tokens=2",
    "lists.candidates=20",
    "lists.validation_steps=100",
    "evaluation.resamples=100",
    "evaluation.explained_requests=5",
    "gates=[{kind: bound, metric: ranking.ranker.auc, at_least: 0.5}, {kind: against_champion, metric: list.ndcg@10, margin: 1.0}]",
)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The quickstart at a size for tests, on planted data, from raw events to a served champion."""
    from rich.console import Console

    from pipelines.recipe import Recipe
    from pipelines.run import execute
    from recsys.core.config import load_recipe

    recipe = load_recipe(Recipe, "quickstart", TINY)
    return execute(recipe, tmp_path_factory.mktemp("home"), Console(quiet=True))
