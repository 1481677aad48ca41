# SPDX-License-Identifier: Apache-2.0
"""A process is asked to end by SIGTERM or, where signals do not reach it, by a file."""

import os
import signal
from pathlib import Path

import pytest

from recsys.training.preemption import STOP, Sigterm


def test_the_signal_is_noted_told_once_and_dealt_with_as_before_afterwards() -> None:
    before, told = signal.getsignal(signal.SIGTERM), []
    with Sigterm(lambda: told.append("told")) as sigterm:
        assert not sigterm.came
        os.kill(os.getpid(), signal.SIGTERM)
        assert sigterm.came and told == ["told"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_file_is_as_good_as_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STOP, str(tmp_path / "stop"))
    with Sigterm() as sigterm:
        assert not sigterm.came
        (tmp_path / "stop").touch()
        assert sigterm.came
