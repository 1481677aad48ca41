# SPDX-License-Identifier: Apache-2.0
"""Where tasks run changes neither their answers nor their errors."""

import os
import sys

import pytest

from recsys.core.config import read_recipe
from recsys.core.engine import Engine, run_tasks, started
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json

ENGINES = {"here": Engine(), "processes": Engine(workers=2), "ray": Engine(name="ray", workers=2)}


@pytest.mark.parametrize("name", ["here", "processes", pytest.param("ray", marks=pytest.mark.slow)])
def test_answers_come_in_the_order_of_the_tasks_and_errors_as_they_were_raised(name: str) -> None:
    if name == "ray":
        pytest.importorskip("ray")
    engine, calls = ENGINES[name], []
    tasks = [{"ü": place, "list": [None, 1.5]} for place in range(7)]
    with started(engine):
        answers = run_tasks(engine, "hash", sha256_json, tasks, lambda *call: calls.append(call))
        assert answers == [sha256_json(task) for task in tasks]
        assert calls == [("hash", done, 7) for done in range(1, 8)]
        assert run_tasks(engine, "nothing", sha256_json, []) == []
        with pytest.raises(ConfigError, match=r"^unknown recipe 'quikstart'; did you mean 'quickstart'\?"):
            run_tasks(engine, "read", read_recipe, ["quickstart", "quikstart", "quickstart"])


@pytest.mark.slow
def test_ray_uses_several_workers_of_a_cluster_that_is_left_running() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run_tasks(ENGINES["ray"], "read", read_recipe, ["quickstart"])
        assert ray.is_initialized()
        pids = run_tasks(ENGINES["ray"], "sleep", _sleep_and_tell, [0.5] * 4)
        assert len(set(pids)) == 2 and os.getpid() not in pids
    finally:
        ray.shutdown()


def _sleep_and_tell(seconds: float) -> int:
    import time

    time.sleep(seconds)
    return os.getpid()


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"engine: ray: .*pip install 'recsys-scaling\[ray\]'"), started(ENGINES["ray"]):
        pass
    with pytest.raises(ConfigError, match="engine: ray: "):
        run_tasks(ENGINES["ray"], "hash", sha256_json, [1])
