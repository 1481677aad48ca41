# SPDX-License-Identifier: Apache-2.0
import io
import re

import pytest
from rich.console import Console

from recsys.training.progress import RichProgress, track


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=160), stream


def train(progress: RichProgress, end: bool = True) -> None:
    progress.start_epoch(1, 2, batches=4, done=1)
    for step in (2, 3, 4):
        progress.advance(step, 0.5, 32)
    if end:
        progress.end_epoch({"train_loss": 0.25, "recall@10": 0.125})
    progress.close()


def test_elsewhere_than_in_a_terminal_an_epoch_is_one_line() -> None:
    out, stream = console(terminal=False)
    train(RichProgress("[ranker]", out))
    assert re.fullmatch(r"\[ranker\] epoch 1/2  train_loss 0\.2500  recall@10 0\.1250  [\d,]+ samples/s\n", stream.getvalue())


def test_a_terminal_gets_a_bar_and_the_line() -> None:
    out, stream = console(terminal=True)
    train(RichProgress("ranker", out))
    assert "step 4  loss 0.5000" in stream.getvalue() and "4/4" in stream.getvalue()
    assert "train_loss 0.2500" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_epoch_that_is_cut_off_leaves_no_bar(terminal: bool) -> None:
    out, stream = console(terminal)
    progress = RichProgress("ranker", out)
    train(progress, end=False)
    progress.close()
    assert terminal or stream.getvalue() == ""
    train(progress)
    assert "train_loss" in stream.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_track_yields_everything_in_order(terminal: bool) -> None:
    out, stream = console(terminal)
    assert list(track(range(1000), "joining", console=out)) == list(range(1000))
    assert list(track((x for x in "ab"), "letters", console=out)) == ["a", "b"]
    if terminal:
        assert "joining" in stream.getvalue() and "1000/1000" in stream.getvalue()
    else:
        assert re.fullmatch(r"joining: 1,000 in \d+\.\d s\nletters: 2 in \d+\.\d s\n", stream.getvalue())


def test_track_within_an_epoch_of_a_terminal() -> None:
    out, stream = console(terminal=True)
    progress = RichProgress("ranker", out)
    progress.start_epoch(1, 1, batches=1, done=0)
    assert list(track([1, 2], "inner", console=out)) == [1, 2]
    progress.end_epoch({})
    assert "inner" in stream.getvalue()
