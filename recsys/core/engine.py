# SPDX-License-Identifier: Apache-2.0
"""Where the tasks of a large job run: one after another, in processes of this machine, or on a Ray cluster.

A task is a function of this project and a plain JSON value, and so is its answer: data goes through files, which every worker must see
under the same paths. Tasks can be run again, also after they were broken off, so that a cluster may repeat what a lost worker had begun.
"""

import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

from pydantic import PositiveInt

from recsys.core import errors
from recsys.core.config import Config
from recsys.core.errors import ConfigError, RecsysError
from recsys.core.memory import give_back_memory

Task = Callable[[Any], Any]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many of its tasks are done, and how many there are."""


class Engine(Config):
    """Where tasks run, or the processes of a training.

    Attributes:
        name: ``local`` or ``ray``.
        workers: how many tasks or processes run at once; memory is needed for each. One at a time of ``local`` runs in this process.
        address: of a running Ray cluster, such as ``auto``; by default a local one is started, with ``workers`` workers, and stopped.
    """

    name: Literal["local", "ray"] = "local"
    workers: PositiveInt = 1
    address: str | None = None


def run_tasks(engine: Engine, what: str, function: Task, tasks: Sequence[Any], progress: Progress | None = None) -> list[Any]:
    """The answers of ``function`` to the tasks, in their order.

    Args:
        engine: where.
        what: what is being done, for ``progress``.
        function: of a module, so that another process can import it.
        tasks: plain JSON values.
        progress: see `Progress`.

    Raises:
        ConfigError: Ray is asked for and not installed.
        RecsysError: what a task raised.
    """
    answers: list[Any] = [None] * len(tasks)
    for done, (place, answer) in enumerate(_answers(engine, function, tasks), start=1):
        answers[place] = answer
        if progress is not None:
            progress(what, done, len(tasks))
    return answers


def _answers(engine: Engine, function: Task, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    if not tasks:
        return iter(())
    if engine.name == "ray":
        return _on_ray(engine, function, tasks)
    if engine.workers > 1:
        return _in_processes(engine, function, tasks)
    return _here(function, tasks)


def _here(function: Task, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for place, task in enumerate(tasks):
        answer = function(task)
        give_back_memory()
        yield place, answer


def _in_processes(engine: Engine, function: Task, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    # Started anew and not forked: the threads of Arrow and Polars do not survive a fork.
    with ProcessPoolExecutor(engine.workers, multiprocessing.get_context("spawn")) as pool:
        places = {pool.submit(_guarded, function, json.dumps(task)): place for place, task in enumerate(tasks)}
        try:
            for future in as_completed(places):
                yield places[future], _opened(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(engine: Engine, function: Task, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    def row(item: dict[str, Any]) -> dict[str, Any]:
        return {"place": item["place"], "answer": _guarded(function, item["task"])}

    with started(engine):
        ray = import_ray()
        items = [{"place": place, "task": json.dumps(task)} for place, task in enumerate(tasks)]
        pool = ray.data.TaskPoolStrategy(size=engine.workers)
        rows = ray.data.from_items(items, override_num_blocks=len(items)).map(row, compute=pool, num_cpus=1)
        for done in rows.iter_rows():
            yield done["place"], _opened(done["answer"])


def import_ray() -> ModuleType:
    """Ray with Ray Data; `ConfigError` where it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"engine: ray: {error}; install it with pip install 'recsys-scaling[ray]', or use the engine local") from None
    module: ModuleType = ray
    return module


@contextmanager
def started(engine: Engine, *, told: bool = False) -> Iterator[None]:
    """For ``ray`` a connection to the cluster, kept over several calls of `run_tasks`; one that is there already is used and left.

    Args:
        engine: where.
        told: whether what the workers write is shown here.

    Raises:
        ConfigError: Ray is asked for and not installed.
    """
    if engine.name != "ray" or import_ray().is_initialized():
        yield
        return
    ray = import_ray()
    where: dict[str, Any] = {"address": engine.address}
    if engine.address is None:
        where = {"num_cpus": engine.workers, "include_dashboard": False}
    ray.init(**where, log_to_driver=told, logging_level=logging.ERROR, job_config=_quiet(ray))
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    context.enable_progress_bars = False
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _quiet(ray: ModuleType) -> Any:
    """Of Ray's own processes errors alone are told; a worker of Ray Train sets its own level again."""
    job = ray.job_config.JobConfig()
    job.set_py_logging_config(ray.LoggingConfig(log_level="ERROR"))
    return job


def _guarded(function: Task, task: str) -> str:
    """The answer, or the error of ours, as JSON: so that it comes out of any worker as it was raised."""
    try:
        return json.dumps({"answer": function(json.loads(task))})
    except RecsysError as error:
        return json.dumps({"error": type(error).__name__, "message": str(error)})
    finally:
        give_back_memory()


def _opened(text: str) -> Any:
    content = json.loads(text)
    if "error" in content:
        raise getattr(errors, content["error"], RecsysError)(content["message"])
    return content["answer"]
