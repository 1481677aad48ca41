# SPDX-License-Identifier: Apache-2.0
"""Probes: each imports one library, tries what the product needs of it, and says what works. They run in child processes."""

import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

# Opens the line of stdout that holds the outcome; libraries print lines of their own.
MARK = "outcome: "


class Trial:
    """What was tried of one library."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.can: dict[str, str] = {}
        self.cannot: dict[str, str] = {}

    def attempt(self, what: str, action: Callable[[], str | None]) -> None:
        """Note that ``what`` works, with the word on it that ``action`` returns, or why it does not."""
        try:
            self.can[what] = action() or "works"
        except Exception as error:
            self.cannot[what] = _one_line(error)


def main(name: str) -> None:
    """Run one probe and print its outcome as one line of JSON."""
    outcome: dict[str, Any]
    try:
        trial: Trial = import_module(f"{__name__}.{name}").probe()
        outcome = {"version": trial.version, "can": trial.can, "cannot": trial.cannot}
    except ModuleNotFoundError as error:
        outcome = {"error": _one_line(error), "missing": error.name}
    except Exception as error:
        outcome = {"error": _one_line(error)}
    print(f"\n{MARK}{json.dumps(outcome)}", flush=True)


def expect(condition: object, what: str) -> None:
    """Raise an `ArithmeticError` that says ``what`` was wrong, unless the condition holds."""
    if not condition:
        raise ArithmeticError(f"wrong result: {what}")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
