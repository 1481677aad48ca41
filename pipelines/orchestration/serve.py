# SPDX-License-Identifier: Apache-2.0
"""Dagster's web UI over a recipe, on demand: its processes get the recipe through the environment."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from recsys.core.errors import RecsysError
from recsys.core.files import write_bytes

ENVIRONMENT = "RECSYS_DAGSTER"
_INSTANCE = """\
telemetry:
  enabled: false
"""


def command(host: str, port: int) -> list[str]:
    """What starts the UI, the daemon of schedules and backfills, and the process that holds the definitions."""
    return [sys.executable, "-m", "dagster", "dev", "-m", "pipelines.orchestration.definitions", "-h", host, "-p", str(port)]


def environment(recipe: str, overrides: list[str], home: Path) -> dict[str, str]:
    """The environment in which it runs; its own files stand below the home."""
    own = home.resolve() / "dagster"
    own.mkdir(parents=True, exist_ok=True)
    if not (own / "dagster.yaml").exists():
        write_bytes(own / "dagster.yaml", _INSTANCE.encode())
    told = json.dumps({"recipe": recipe, "overrides": overrides, "home": str(home.resolve())})
    return {**os.environ, "DAGSTER_HOME": str(own), "DAGSTER_DISABLE_TELEMETRY": "yes", ENVIRONMENT: told}


def serve(recipe: str, overrides: list[str], home: Path, host: str, port: int) -> NoReturn:
    """Become the UI's process, which runs until it is interrupted or terminated.

    Raises:
        RecsysError: Dagster is not installed.
    """
    try:
        import dagster_webserver  # noqa: F401
    except ImportError:
        raise RecsysError("dagster and dagster-webserver are not installed: pip install dagster dagster-webserver") from None
    told = environment(recipe, overrides, home)
    # A shell starts what runs in the background with interrupts ignored, and Dagster treats termination as it does interrupts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    started = command(host, port)
    os.execve(started[0], started, told)
