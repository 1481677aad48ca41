# SPDX-License-Identifier: Apache-2.0
"""The interval rule and the JSON line."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.__main__ import main
from benchmarks.frame import Check, Result, ratio
from benchmarks.worker import Worker


def test_the_interval_is_scipys_on_logarithms() -> None:
    ours, theirs = [3.0, 3.3, 2.9, 3.6, 3.1], [1.0, 1.05, 1.0, 1.1, 0.95]
    found = ratio(ours, theirs)
    logs = np.log(np.array(ours) / np.array(theirs))
    low, high = stats.t.interval(0.9, 4, loc=logs.mean(), scale=stats.sem(logs))
    assert found.estimate == pytest.approx(math.exp(logs.mean()))
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))


def test_the_lower_end_decides_not_the_estimate() -> None:
    noisy = ratio([4.0, 2.0, 5.0, 2.5, 4.5], [1.0] * 5)
    assert noisy.estimate > 3
    assert not noisy.at_least("three_times", 3).holds
    assert ratio([3.2, 3.21, 3.19, 3.2, 3.22], [1.0] * 5).at_least("three_times", 3).holds


def test_the_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        values = np.exp(random.normal(np.log(2), 0.2, 6))
        found = ratio(list(values), [1.0] * 6)
        hits += found.low <= 2 <= found.high
    assert 0.87 <= hits / 1000 <= 0.93


@pytest.mark.parametrize(("ours", "theirs"), [([1.0] * 4, [1.0] * 4), ([1.0] * 5, [1.0] * 6), ([1.0] * 5, [0.0] * 5)])
def test_what_is_no_ratio_is_refused(ours: list[float], theirs: list[float]) -> None:
    with pytest.raises(ValueError, match="a ratio needs"):
        ratio(ours, theirs)


def test_the_json_line_says_whether_each_check_holds() -> None:
    result = Result("x", rows=[{"a": 1}], checks=[Check("fast", 2.0, at_least=3), Check("small", 1.0, at_most=2)])
    line = json.loads(result.json_line())
    assert [(c["name"], c["holds"]) for c in line["checks"]] == [("fast", False), ("small", True)]
    assert line["checks"][0]["at_least"] == 3
    assert {"machine", "commit", "benchmark"} <= line.keys()


def test_an_unknown_benchmark_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ranking_trainin"])
    assert "did you mean 'ranking_training'" in capsys.readouterr().err


def test_a_worker_answers_in_turns_and_names_its_failure(tmp_path: Path) -> None:
    script = tmp_path / "contestant.py"
    script.write_text("from benchmarks.worker import serve\nprint('noise')\nserve(lambda request: {'twice': 2 * request['x']})\n")
    with Worker("twice", sys.executable, script, threads=1) as worker:
        assert worker.ask(x=3) == {"twice": 6}
        assert worker.ask(x=4) == {"twice": 8}
        with pytest.raises(RuntimeError, match="twice ended with status 1"):
            worker.ask(y=1)
