# SPDX-License-Identifier: Apache-2.0
"""Runs a probe in a child process, so that a library that is broken, crashes or hangs takes nothing with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.doctor.probes import MARK
from pipelines.doctor.supported import ROOT

# This project comes last on the path: what is probed is what a program would import.
_START = "import sys; sys.path.append(sys.argv[1]); from pipelines.doctor.probes import main; main(sys.argv[2])"


@dataclass(frozen=True)
class Outcome:
    """What a probe found.

    Attributes:
        version: as the library tells it, or None where it could not be imported.
        can: what works here, with a word on how.
        cannot: what was tried and failed, with the reason.
        error: why there is no answer, or None.
        missing: the module that could not be found, where that is the error.
    """

    version: str | None = None
    can: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    missing: str | None = None


def run_probe(name: str, *, timeout: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """The outcome of ``pipelines/doctor/probes/<name>.py``.

    Args:
        name: the probe.
        timeout: seconds, after which the child is killed.
        environment: variables to set for the child.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with subprocess.Popen(
        [sys.executable, "-c", _START, str(ROOT), name],
        env={**inherited, "PYTHONSAFEPATH": "1", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:
        try:
            stdout, stderr = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            return Outcome(error=f"no answer within {timeout:g} s (--timeout)")
    answer = next((line for line in reversed(stdout.splitlines()) if line.startswith(MARK)), None)
    if child.returncode == 0 and answer is not None:
        return Outcome(**json.loads(answer.removeprefix(MARK)))
    return Outcome(error=_cause_of_death(child.returncode, stderr))


def _cause_of_death(status: int, stderr: str) -> str:
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    cause = f"the process died of {signal.Signals(-status).name}" if status < 0 else f"the process ended with status {status}"
    return f"{cause}: {last}" if last else cause
