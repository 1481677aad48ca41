# SPDX-License-Identifier: Apache-2.0
import json
import logging
import math
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_model import Small, data, make_loader, to_batch, validate
from torch import Tensor, nn

from recsys.core.config import parse
from recsys.core.errors import CheckpointError, ConfigError, DataError
from recsys.data.batch import RankingBatch, SequenceBatch
from recsys.data.loader import ParquetLoader, TableLoader
from recsys.data.sequences import SequenceData
from recsys.data.windows import SequenceLoader
from recsys.training.checkpoint import Checkpointing, Checkpoints
from recsys.training.optim import DenseOptimizer, Schedule
from recsys.training.progress import NoProgress
from recsys.training.trainer import Monitor, NonFiniteError, Trainer


class Scripted:
    """A validation that says what it was told to, and remembers the weights it saw."""

    def __init__(self, values: Iterable[float], name: str = "auc") -> None:
        self.values, self.name = iter(values), name
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        self.seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {self.name: next(self.values)}


class Recorder:
    """A tracker that keeps everything."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params |= params

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_artifact(self, path: Path) -> None:
        raise AssertionError


def config(**values: Any) -> Trainer.Config:
    return Trainer.Config(**{"epochs": 3, "optimizer": DenseOptimizer(learning_rate=0.01)} | values)


def trainer(run_dir: Path, tracker: Any = None, context: Any = None, **values: Any) -> Trainer:
    return Trainer(config(**values), run_dir, tracker=tracker, progress=NoProgress(), context=context)


def small() -> Small:
    torch.manual_seed(1)
    return Small()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_is_the_plain_loop(tmp_path: Path) -> None:
    """Against the same steps written out by hand, with torch's own scheduler and clipping."""
    ours, theirs = small(), small()
    torch.manual_seed(2)
    trainer(tmp_path, clip_norm=0.3, schedule=Schedule(name="cosine")).fit(ours, make_loader())
    torch.manual_seed(2)
    matrices, vectors = ([p for p in theirs.mlp.parameters() if (p.ndim > 1) == big] for big in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=0.01, weight_decay=0.0)
    dense = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    loader = make_loader()
    theirs.train()
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            theirs.tables.set_learning_rate(0.1 * optimizer.param_groups[0]["lr"] / 0.01)
            optimizer.zero_grad()
            theirs.loss(batch)[0].backward()
            nn.utils.clip_grad_norm_(theirs.mlp.parameters(), 0.3)
            optimizer.step()
            dense.step()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)
    assert not ours.training


def test_the_loss_falls_and_the_history_says_so(tmp_path: Path) -> None:
    history = trainer(tmp_path, epochs=12).fit(small(), make_loader(), validate)
    rows = history.rows()
    assert [row["epoch"] for row in rows] == list(range(1, 13)) and [row["step"] for row in rows] == [5 * e for e in range(1, 13)]
    assert rows[-1]["train_loss"] < 0.9 * rows[0]["train_loss"] and rows[-1]["train_loss"] == rows[-1]["train_bce"]
    assert set(rows[0]) == {"epoch", "step", "train_loss", "train_bce", "loss", "distance"}
    assert (history.best, history.steps, history.skipped, history.stopped_early) == (None, 60, 0, False)
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stopping_restores_the_best_weights(tmp_path: Path, mode: str) -> None:
    sign = 1 if mode == "max" else -1
    script = Scripted([sign * v for v in (0.5, 0.7, 0.7, 0.6, 0.9)])
    model = small()
    history = trainer(tmp_path, epochs=9, monitor=Monitor(metric="auc", mode=mode, patience=2)).fit(model, make_loader(), script)
    assert len(script.seen) == 4, "an equal value is no improvement, and two validations without one end the run"
    assert history.stopped_early and history.best.epoch == 2 and len(history.epochs) == 4
    assert same(model.state_dict(), script.seen[1]) and not same(script.seen[1], script.seen[3])


def test_without_patience_all_epochs_run_and_the_best_weights_stay(tmp_path: Path) -> None:
    script, model = Scripted([0.5, 0.4, 0.3]), small()
    history = trainer(tmp_path, monitor=Monitor(metric="auc")).fit(model, make_loader(), script)
    assert not history.stopped_early and history.best.epoch == 1 and same(model.state_dict(), script.seen[0])


def test_without_a_monitor_the_last_weights_stay(tmp_path: Path) -> None:
    script, model = Scripted([0.5, 0.4, 0.3]), small()
    trainer(tmp_path).fit(model, make_loader(), script)
    assert same(model.state_dict(), script.seen[2])


def test_nan_is_never_better(tmp_path: Path) -> None:
    script = Scripted([math.nan, 0.4, math.nan])
    history = trainer(tmp_path, monitor=Monitor(metric="auc")).fit(small(), make_loader(), script)
    assert history.best.epoch == 2
    assert [row["auc"] for row in history.rows()] == [None, 0.4, None]


def test_validation_every_few_epochs_and_after_the_last(tmp_path: Path) -> None:
    script = Scripted([0.1, 0.2, 0.3])
    history = trainer(tmp_path, epochs=5, validate_every=2, monitor=Monitor(metric="auc")).fit(small(), make_loader(), script)
    assert [bool(record.validation) for record in history.epochs] == [False, True, False, True, True]


def test_a_finished_run_is_loaded_and_not_trained_again(tmp_path: Path) -> None:
    settings = {"monitor": Monitor(metric="auc")}
    first, script = small(), Scripted([0.5, 0.9, 0.3])
    history = trainer(tmp_path, **settings).fit(first, make_loader(), script)
    again = Small()
    assert trainer(tmp_path, **settings).fit(again, make_loader(), Scripted([])) == history
    assert same(again.state_dict(), first.state_dict())


@pytest.mark.parametrize("batches", [4, 5, 7])
def test_an_error_in_between_does_not_change_the_outcome(tmp_path: Path, batches: int) -> None:
    whole = small()
    torch.manual_seed(3)
    expected = trainer(tmp_path / "whole" / "run").fit(whole, make_loader(), validate)
    broken, count = small(), [0]
    plain = broken.loss

    def failing(batch: Any) -> Any:
        count[0] += 1
        if count[0] > batches:
            raise RuntimeError("the machine is on fire")
        return plain(batch)

    broken.loss = failing  # type: ignore[method-assign]
    torch.manual_seed(3)
    often = {"checkpoint": Checkpointing(every_steps=1)}
    with pytest.raises(RuntimeError, match="on fire"):
        trainer(tmp_path / "run", **often).fit(broken, make_loader(), validate)
    torch.manual_seed(99)
    again = Small()
    assert trainer(tmp_path / "run", **often).fit(again, make_loader(), validate) == expected
    assert same(again.state_dict(), whole.state_dict())


class Counting(nn.Module):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[int] = []
        self.limit = 10**9

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        values = batch.targets if isinstance(batch, SequenceBatch) else batch.sparse.values()
        if len(self.seen) + len(values) > self.limit:
            raise RuntimeError("enough")
        self.seen += values.tolist()
        return (self.weight - values.float().mean()).square().sum(), {}


def sequence_loader() -> SequenceLoader:
    """60 events of 12 users, each item once."""
    users = pa.array([f"u{i}" for i in range(12)])
    order, times = np.arange(60), np.arange(60) * 1_000_000
    return SequenceLoader(SequenceData(users, np.arange(0, 61, 5), order, order % 5, times), max_length=3, batch_size=4, seed=1)


def parquet_loader(folder: Path) -> ParquetLoader[RankingBatch]:
    folder.mkdir(exist_ok=True)
    table = data(60).set_column(0, "item", pa.array(np.arange(60)))
    pq.write_table(table, folder / "part.parquet", row_group_size=13)
    return ParquetLoader(folder, to_batch, batch_size=8, seed=2, buffer_groups=2, prefetch=1)


@pytest.mark.parametrize("kind", ["parquet", "sequences"])
@pytest.mark.parametrize("limit", [20, 59, 60, 90])
def test_every_loader_gives_each_sample_once_an_epoch_whatever_happens(tmp_path: Path, kind: str, limit: int) -> None:
    def loader() -> Any:
        return sequence_loader() if kind == "sequences" else parquet_loader(tmp_path / "data")

    often = {"epochs": 2, "checkpoint": Checkpointing(every_steps=1)}
    whole = Counting()
    trainer(tmp_path / "whole" / "run", **often).fit(whole, loader())
    assert sorted(whole.seen[:60]) == sorted(whole.seen[60:]) == list(range(60)) and whole.seen[:60] != whole.seen[60:]
    first, second = Counting(), Counting()
    first.limit = limit
    with pytest.raises(RuntimeError, match="enough"):
        trainer(tmp_path / "run", **often).fit(first, loader())
    trainer(tmp_path / "run", **often).fit(second, loader())
    again = len(first.seen) + len(second.seen) - 120
    assert 0 <= again <= 12, "at the end of an epoch there is no checkpoint, so its last batch may come again"
    assert first.seen[: len(first.seen) - again] + second.seen == whole.seen


def test_another_configuration_does_not_continue_the_run(tmp_path: Path) -> None:
    trainer(tmp_path, context={"seed": 1}).fit(small(), make_loader())
    for other, loader, message in (
        (trainer(tmp_path, context={"seed": 1}, epochs=4), make_loader(), r"trainer\.epochs: .* with 3, this run has 4"),
        (trainer(tmp_path, context={"seed": 2}), make_loader(), r"context\.seed: .* with 1, this run has 2"),
        (trainer(tmp_path, context={"seed": 1}), make_loader(batch_size=15), r"batch_size: .* with 16, this run has 15"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.fit(small(), loader)
    other = small()
    other.mlp[0] = nn.Linear(5, 9)
    with pytest.raises(CheckpointError, match=r"shapes\.mlp\.0\.bias: .* with \[8\], this run has \[9\]"):
        trainer(tmp_path, context={"seed": 1}).fit(other, make_loader())
    # How often to save is not what decides the course of a run.
    trainer(tmp_path, context={"seed": 1}, checkpoint=Checkpointing(keep=1), log_every=1).fit(small(), make_loader())


class Poisoned(Small):
    """Its loss, or its gradient, is not finite at some steps."""

    def __init__(self, steps: set[int], where: str) -> None:
        super().__init__()
        self.steps, self.where, self.step = steps, where, 0
        self.before: dict[str, Tensor] = {}

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.step += 1
        loss, parts = super().loss(batch)
        if self.step in self.steps:
            # The root has an infinite slope at 0 while its value is finite.
            spoil = self.mlp[0].bias[0] * math.nan if self.where == "loss" else (self.mlp[0].bias * 0).sum().sqrt()
            loss = loss + spoil
        return loss, parts


@pytest.mark.parametrize(("where", "steps"), [("loss", [2, 9]), ("gradient norm", [2, 2, 8])])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    tmp_path: Path, where: str, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """The model spoils its second and its ninth loss. A gradient goes into the tables: back to the first checkpoint, and on without it."""
    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        model = Poisoned({2, 9}, where)
        history = trainer(tmp_path).fit(model, make_loader())
    assert history.skipped == 2 and history.steps == 15
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert math.isfinite(history.rows()[0]["train_loss"])
    assert [m.split(" is")[0] for m in caplog.messages if "left out" in m] == [f"step {n}: the {where}" for n in steps]


def test_a_batch_that_is_not_as_it_should_be_is_left_out_until_there_are_too_many(tmp_path: Path) -> None:
    class Strict(Small):
        def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            if bool((batch.sparse.values() == 7).any()):
                raise DataError("item: expected none of 7")
            return super().loss(batch)

    bad = sum(bool((batch.sparse.values() == 7).any()) for batch in make_loader())
    assert 0 < bad < 5
    history = trainer(tmp_path / "some", epochs=1, max_skipped=bad).fit(Strict(), make_loader())
    assert history.skipped == bad
    with pytest.raises(DataError, match=rf"step \d: item: expected none of 7; {bad - 1} steps before it were left out"):
        trainer(tmp_path / "too many", epochs=1, max_skipped=bad - 1).fit(Strict(), make_loader())


def test_a_gradient_far_above_those_before_is_told_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Jumps(Small):
        calls = 0

        def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            self.calls += 1
            loss, parts = super().loss(batch)
            return (loss * 1000 if self.calls == 14 else loss), parts

    with caplog.at_level(logging.WARNING):
        torch.manual_seed(0)
        run = trainer(tmp_path, checkpoint=Checkpointing(every_steps=1))
        run.fit(Jumps(), make_loader())
    told = [message for message in caplog.messages if "times the median" in message]
    assert len(told) == 1 and told[0].startswith("step 14: the gradient norm is")
    newest = Checkpoints(tmp_path / "checkpoints", 3, {}).at(15)
    assert newest.read("progress")["spikes"] == 1


def test_a_loss_that_is_not_finite_moves_no_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Poisoned(set(range(1, 100)), "loss")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    history = trainer(tmp_path, epochs=1).fit(model, make_loader())
    assert history.skipped == 5 and history.epochs[0].train == {}
    assert same(before, model.state_dict())


def test_too_many_steps_that_are_not_finite_are_an_error_that_names_the_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(NonFiniteError, match=r"step 8: the loss is nan, .* in 2 steps before \(max_skipped is 2\)"):
        trainer(tmp_path, max_skipped=2).fit(Poisoned({3, 6, 8}, "loss"), make_loader())


def test_the_monitor_must_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.metric: unknown metric 'auc'; did you mean 'gauc'\? \(known: gauc\)"):
        trainer(tmp_path, monitor=Monitor(metric="auc")).fit(small(), make_loader(), Scripted([0.5], "gauc"))
    with pytest.raises(ConfigError, match="monitor: 'auc' is to be watched, but there is no validation"):
        trainer(tmp_path, monitor=Monitor(metric="auc")).fit(small(), make_loader())


def test_there_must_be_a_batch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="loader: there is no batch to train on"):
        trainer(tmp_path).fit(small(), TableLoader(data(3), to_batch, batch_size=4, drop_last=True))


def test_the_recipe_form(tmp_path: Path) -> None:
    values = {
        "epochs": 3,
        "optimizer": {"name": "adamw", "learning_rate": 0.001, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 50},
        "monitor": {"metric": "auc", "mode": "max", "patience": 2},
    }
    assert parse(Trainer.Config, values, source="test").monitor == Monitor(metric="auc", patience=2)
    with pytest.raises(ConfigError, match=r"monitor\.paitence: unknown key 'paitence'; did you mean 'patience'"):
        parse(Trainer.Config, values | {"monitor": {"metric": "auc", "paitence": 2}}, source="test")


def test_trackers_hear_of_steps_and_epochs(tmp_path: Path) -> None:
    recorder = Recorder()
    run = tmp_path / "ranker"
    schedule = Schedule(warmup_steps=10)
    trainer(run, tracker=recorder, log_every=2, epochs=2, schedule=schedule).fit(small(), make_loader(), validate)
    assert recorder.params["ranker/trainer"]["epochs"] == 2
    steps = [(step, values) for step, values in recorder.metrics if "ranker/batch_loss" in values]
    assert [step for step, _ in steps] == [2, 4, 6, 8, 10]
    assert [values["ranker/learning_rate"] for _, values in steps] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    epochs = [(step, values) for step, values in recorder.metrics if "ranker/train_loss" in values]
    assert [(step, values["ranker/epoch"]) for step, values in epochs] == [(5, 1), (10, 2)]
    assert all("ranker/loss" in values and "ranker/batch_loss" not in values for _, values in epochs)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10, 10]
    assert {"step", "epoch", "train_loss", "train_bce", "loss", "distance"} == set(lines[2])
    of_the_machine = {"steps_per_second", "samples_per_second", "waited_for_data", "memory_gib"}
    assert {"step", "batch_loss", "batch_bce", "learning_rate", "gradient_norm"} | of_the_machine == set(lines[0])


def test_the_learning_rate_of_fused_tables_is_whole_again_after_the_run(tmp_path: Path) -> None:
    model = small()
    trainer(tmp_path, schedule=Schedule(name="cosine")).fit(model, make_loader())
    assert model.tables.learning_rate == pytest.approx(0.1)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_is_autocast_and_auto_is_fp32_on_a_cpu(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    class Spy(Small):
        def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            dtypes.append(self.mlp[0](torch.ones(2, 5)).dtype)
            loss, parts = super().loss(batch)
            return loss.float(), parts

    for precision, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        dtypes.clear()
        model = Spy()
        trainer(tmp_path / precision, epochs=1, precision=precision).fit(model, make_loader())
        assert set(dtypes) == {dtype} and model.mlp[0].weight.dtype == torch.float32


def test_it_trains_outside_the_main_thread(tmp_path: Path) -> None:
    model, histories = small(), []
    thread = threading.Thread(target=lambda: histories.append(trainer(tmp_path, epochs=1).fit(model, make_loader())))
    thread.start()
    thread.join()
    assert histories[0].steps == 5


def test_a_model_without_fused_tables(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
            return (self.linear(batch.dense) - batch.labels).square().mean(), {}

    model = Plain()
    history = trainer(tmp_path, epochs=30, optimizer=DenseOptimizer(name="adam", learning_rate=0.05)).fit(model, make_loader())
    x, y = (getattr(to_batch(data()), name) for name in ("dense", "labels"))
    best = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), y).solution[:, 0]
    assert history.rows()[-1]["train_loss"] < history.rows()[0]["train_loss"]
    assert float(model.linear.weight.detach()) == pytest.approx(float(best[0]), abs=0.05)
