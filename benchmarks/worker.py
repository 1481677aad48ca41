# SPDX-License-Identifier: Apache-2.0
"""A contestant in a process of its own, so that each can have its own environment, asked in turns over a pipe.

The process runs a script that reads one JSON request a line from standard input and answers each with one line on standard output.
Whatever else it prints is passed on to standard error. Between requests it waits and takes no processor time: contestants alternate.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
_MARK = "answer: "


class Worker:
    """A running contestant.

    Args:
        name: for errors.
        python: the interpreter of its environment.
        script: what it runs.
        arguments: of the script.
        threads: how many threads its libraries may use.
    """

    def __init__(self, name: str, python: Path | str, script: Path, *arguments: str, threads: int) -> None:
        self.name = name
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [str(python), str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables, bufsize=1
        )

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the contestant failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, which the missing answer tells
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return answer
            sys.stderr.write(line)
        raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; its error stands above")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The contestant's side: answer requests until standard input ends."""
    for line in sys.stdin:
        print(_MARK + json.dumps(handle(json.loads(line))), flush=True)
