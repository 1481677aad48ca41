# SPDX-License-Identifier: Apache-2.0
"""Start a training in several processes, by torchrun or by Ray Train, and what each of them does first and last."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from recsys.core.engine import Engine
from recsys.core.errors import ConfigError, RecsysError
from recsys.core.files import read_json, write_json
from recsys.data.world import World
from recsys.training.preemption import RESUMABLE, Sigterm

MACHINES = "RECSYS_TORCHRUN"
RUN = "RECSYS_RUN"  # names one start of a training and its restarts, where torchrun does not
FAILED = 2  # the exit status of an error that another attempt would meet again
TIMEOUT = timedelta(minutes=60)  # of a collective; `recsys.training.guards.Guards.stuck_seconds` is to be less
_LOOK = 0.1  # seconds between two looks at the processes


def launch(program: Sequence[str], engine: Engine, folder: Path, restarts: int = 0) -> int:
    """Run ``program`` in as many processes as the engine has workers, until it ends.

    Args:
        program: see `command`.
        engine: ``local`` for torchrun on this machine (or more, see `command`), ``ray`` for Ray Train.
        folder: of the training, seen by all processes.
        restarts: see `command`.

    Returns:
        0, `RESUMABLE` where SIGTERM came, or the status of an error.
    """
    if engine.name == "ray":
        from recsys.training import ray_launch  # this engine alone asks for Ray

        return ray_launch.run(program, engine, folder, restarts)
    return run(program, engine.workers, restarts)


def command(program: Sequence[str], processes: int, restarts: int = 0) -> list[str]:
    """The command line that runs ``program`` in so many processes of this machine.

    ``RECSYS_TORCHRUN`` has other options than ``--standalone`` for torchrun, for more machines: see docs/distributed.md.

    Args:
        program: a Python file, or ``-m`` and a module, and its arguments.
        processes: how many.
        restarts: how often all are started anew after one was lost.

    Raises:
        ConfigError: not a number of processes or restarts.
    """
    if processes < 1 or restarts < 0:
        raise ConfigError(f"expected at least 1 process and 0 restarts, got {processes} and {restarts}")
    machines = os.environ.get(MACHINES, "--standalone").split()
    options = [*machines, f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.5"]
    return [sys.executable, "-m", "torch.distributed.run", *options, *program]


def environment() -> Mapping[str, str]:
    """That of the command: one thread for each process, unless said otherwise, as many processes share a machine."""
    # So that the processes meet at another port each time they are started.
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def run(program: Sequence[str], processes: int, restarts: int = 0) -> int:
    """Run a `command` until it ends. SIGTERM to this process is handed on, once: torchrun gives its own 30 seconds to save what they have.

    Returns:
        0, `RESUMABLE` where SIGTERM came or torchrun itself was killed, or the status of an error.
    """
    with Sigterm() as sigterm, subprocess.Popen(command(program, processes, restarts), env=dict(environment())) as running:
        while running.poll() is None and not sigterm.came:
            time.sleep(_LOOK)
        if sigterm.came:
            running.terminate()
        status = running.wait()
    return RESUMABLE if status < 0 or (status and sigterm.came) else status


def join(timeout: timedelta = TIMEOUT) -> World:
    """Join the processes that were started: gloo on the CPU, and NCCL besides where there are GPUs, one for each process.

    Ray Train has joined them already, and torchrun has not.

    Args:
        timeout: of a collective, where torchrun has started this process.

    Raises:
        ConfigError: neither has started this process.
    """
    if dist.is_initialized():
        return World.current()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError("expected to be started by torchrun or by Ray Train: see `recsys train --nproc`")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    # The launcher may keep its store over a restart, with the addresses of the processes that were lost: a name of its own for every start.
    started = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}-{os.environ['MASTER_PORT']}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore(started, store), rank=rank, world_size=size, timeout=timeout)
    return World.current()


def failure(folder: Path, name: str) -> Path:
    """Where the processes of one start of a training write an error that every attempt would meet."""
    return folder / f"failed-{name}.json"


class Attempts:
    """An error that every attempt would meet is met once: the processes that are started after it end at once.

    Args:
        folder: seen by all processes.
    """

    def __init__(self, folder: Path) -> None:
        self._path = failure(folder, os.environ.get(RUN) or os.environ.get("TORCHELASTIC_RUN_ID", "alone"))

    def __enter__(self) -> "Attempts":
        if self._path.exists():
            self._say(str(read_json(self._path)["error"]))
            raise SystemExit(FAILED)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, RecsysError):
            write_json(self._path, {"error": str(error)})
            self._say(str(error))
            os._exit(FAILED)  # without waiting for collectives that the others will not join

    def _say(self, message: str) -> None:
        print(json.dumps({"error": message}, ensure_ascii=False), file=sys.stderr, flush=True)
