# SPDX-License-Identifier: Apache-2.0
"""Trains in forked processes that are killed at chosen points, and prints one JSON line of hashes for each run."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from small_model import Small, make_loader, validate

from recsys.core.files import sha256_file, sha256_json
from recsys.training import checkpoint
from recsys.training.checkpoint import Checkpointing
from recsys.training.optim import DenseOptimizer, Schedule
from recsys.training.progress import NoProgress
from recsys.training.trainer import Monitor, Trainer

CONFIG = Trainer.Config(
    epochs=6,
    optimizer=DenseOptimizer(name="adamw", learning_rate=0.05, weight_decay=0.1),
    schedule=Schedule(name="cosine", warmup_steps=3),
    clip_norm=1.0,
    monitor=Monitor(metric="distance", mode="min", patience=2),
    log_every=2,
    checkpoint=Checkpointing(every_steps=2, keep=2),
)

OF_THE_MACHINE = {"steps_per_second", "samples_per_second", "waited_for_data", "memory_gib"}


def nth_call(function: Callable, n: int, act: Callable[[], None]) -> Callable:
    """``function``, which acts before its n-th call."""
    calls = [0]

    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            act()
        return function(*args, **kwargs)

    return wrapped


def train(directory: Path, point: str | None) -> None:
    """Train, and die (or be asked to end) at ``point``, such as ``kill:step:7``; write what came out."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    model = Small()
    check = validate
    if point:
        what, where, n = point.split(":")
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}[what]

        def act() -> None:
            os.kill(os.getpid(), number)

        if where == "step":
            model.loss = nth_call(model.loss, int(n), act)
        elif where == "validate":
            check = nth_call(validate, int(n), act)
        elif where == "write":
            checkpoint._sync = nth_call(checkpoint._sync, int(n), act)
        elif where == "put":
            Path.rename = nth_call(Path.rename, int(n), act)
    history = Trainer(CONFIG, directory, progress=NoProgress()).fit(model, make_loader(prefetch=2), check)
    weights = {name: tensor.numpy().tobytes().hex() for name, tensor in model.state_dict().items()}
    newest = max((directory / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    files = {p.name: sha256_file(p) for p in sorted(newest.iterdir()) if p.name != "MANIFEST.json"}
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    files["metrics.jsonl"] = [{name: value for name, value in row.items() if name not in OF_THE_MACHINE} for row in metrics]
    result = {"weights": sha256_json(weights), "rows": history.rows(), "best": history.best.epoch, "newest": newest.name, "files": files}
    (directory / "result.json").write_text(json.dumps(result))


def forked(directory: Path, point: str | None) -> int:
    """Train in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            train(directory, point)
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path, points: list[str]) -> None:
    train(root / "warm-up", None)  # so that not every fork imports what torch imports when it is first used
    for point in points:
        directory = root / point.replace(":", "-").replace("+", "_") / "run"
        directory.mkdir(parents=True)
        statuses = [forked(directory, one) for one in point.split("+") if one != "whole"]
        statuses.append(forked(directory, None))
        result = json.loads((directory / "result.json").read_text()) if statuses[-1] == 0 else None
        print(json.dumps({"point": point, "statuses": statuses, "result": result}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
