# SPDX-License-Identifier: Apache-2.0
"""What saving costs: one trained retriever asked with less and less of each history, by several methods, beside the plain baselines."""

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from recsys.core.components import component_config
from recsys.core.config import Config, set_key, validate
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import EvaluationSteps, histories
from recsys.efficiency.cost import Cost
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.scoring import Table
from recsys.evaluation.bootstrap import paired_mean_difference
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.retrieval.base import Retriever
from recsys.retrieval.efficiency import RetrieverEfficiency
from recsys.scaling.judge import CUTOFF
from recsys.scaling.lines import Lines, Row
from recsys.scaling.retrieval_data import Split
from recsys.scaling.retrievers import Retrievers
from recsys.training.progress import TrainingProgress
from recsys.training.trainer import Trainer, Training

WHOLE, LAST, POPULAR, RANDOM = "whole", "last", "popular", "random"
_FORMAT = 1  # of a cell; another one makes every cell new
_DRAWN = 0  # seed of the histories that are timed
_PLAIN = {"selector": {"name": "top_k"}}
BASELINES: Mapping[str, Mapping[str, Any]] = {
    LAST: {"history": {"scorer": {"name": "recency"}, **_PLAIN}},
    POPULAR: {"history": {"scorer": {"name": "recency"}, **_PLAIN}},  # the scorer is replaced by a table of counts
    RANDOM: {"history": {"scorer": {"name": "random"}, **_PLAIN}},
}


class Method(Config):
    """A way to save.

    Attributes:
        label: its name in tables and pictures.
        efficiency: the model's ``efficiency`` but for the budget.
        budget: the dotted key of ``efficiency`` that takes the budget.
    """

    label: str
    efficiency: dict[str, Any]
    budget: str = "history.share"

    def at(self, budget: float) -> RetrieverEfficiency:
        """The configuration for a budget.

        Raises:
            ConfigError: it is none; names the method.
        """
        given = deepcopy(self.efficiency)
        set_key(given, self.budget, budget)
        try:
            found = validate(RetrieverEfficiency, given)
        except ValueError as error:
            raise ConfigError(f"methods: {self.label}: {error}") from None
        assert isinstance(found, RetrieverEfficiency)
        return found


class TradeoffPlan(Config):
    """What is compared.

    Attributes:
        data: histories; see `recsys.scaling.retrieval_data`.
        rows: users or events that are trained on.
        seeds: of the trainings; every method is measured on each.
        model: the retriever.
        training: how it is trained; once for each seed, on whole windows.
        methods: beside the baselines *last*, *popular* and *random*.
        budgets: shares of each history.
        timed: histories whose encoding is counted and timed, one by one, drawn from the test's.
        rounds: of timing.
        max_loss: the share of NDCG@10 that a recommended setting may lose.
    """

    data: component_config("scaling_data")  # type: ignore[valid-type]
    rows: int = Field(ge=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    model: component_config("retriever")  # type: ignore[valid-type]
    training: Training
    methods: tuple[Method, ...] = ()
    budgets: tuple[float, ...] = (0.5, 0.25, 0.1)
    timed: int = Field(64, ge=1)
    rounds: int = Field(5, ge=1)
    max_loss: float = Field(0.02, ge=0.0, lt=1.0)


@dataclass(frozen=True)
class Setting:
    """A method at a budget; the whole history is `WHOLE` at 1."""

    method: str
    budget: float
    efficiency: RetrieverEfficiency | None


def settings(plan: TradeoffPlan) -> list[Setting]:
    """All that is measured: the whole history, then every method and baseline at every budget.

    Raises:
        ConfigError: a budget is out of range, or two methods have one name.
    """
    methods = [*plan.methods, *(Method(label=label, efficiency=dict(given)) for label, given in BASELINES.items())]
    labels = [WHOLE, *(method.label for method in methods)]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"methods: expected labels that differ from each other and from {', '.join([WHOLE, *BASELINES])}, got {labels}")
    found = [Setting(WHOLE, 1.0, None)]
    return found + [Setting(method.label, budget, method.at(budget)) for method in methods for budget in sorted(plan.budgets, reverse=True)]


def study(plan: TradeoffPlan, subject: Retrievers, directory: Path, commit: str, progress: TrainingProgress) -> Iterator[Row]:
    """Measure every setting with every seed, where that is not done; yields the lines of ``cells.jsonl`` in order.

    A line has NDCG@10 and Recall@10 on validation and test; the test's paired differences to the whole history and to *last* at the same
    budget; and for each encoded history the kept events, multiply-adds, gathered bytes and milliseconds (alternating with the whole one).
    """
    lines = Lines(directory / "cells.jsonl")
    wanted = settings(plan)
    for seed in plan.seeds:
        keys = [(_key(plan, subject, setting, seed), setting) for setting in wanted]
        done = lines.read()
        if all(key in done for key, _ in keys):
            yield from (done[key] for key, _ in keys)
            continue
        measured = _Measured(plan, subject, trained(plan, subject, seed, directory, progress))
        for key, setting in keys:
            row = done.get(key) or {"key": key, "seed": seed, "commit": commit, **measured(setting)}
            if key not in done:
                lines.append(row)
            yield row


def recommended(plan: TradeoffPlan, rows: Sequence[Row]) -> tuple[str, float] | None:
    """The method and budget of fewest multiply-adds that lose at most ``max_loss`` of NDCG@10 on validation; None if none does."""
    means: dict[tuple[str, float], tuple[float, float]] = {}
    for setting in settings(plan):
        own = [row for row in rows if (row["method"], row["budget"]) == (setting.method, setting.budget)]
        means[setting.method, setting.budget] = (
            float(np.mean([row["valid"]["ndcg@10"] for row in own])),
            float(np.mean([row["cost"]["macs"] for row in own])),
        )
    bar = means[WHOLE, 1.0][0] * (1 - plan.max_loss)
    kept = {setting: macs for setting, (ndcg, macs) in means.items() if ndcg >= bar and macs < means[WHOLE, 1.0][1]}
    return min(kept, key=lambda setting: kept[setting]) if kept else None


class _Measured:
    """Measures the settings of one trained model."""

    def __init__(self, plan: TradeoffPlan, subject: Retrievers, model: Retriever) -> None:
        self._plan, self._subject, self._model = plan, subject, model
        self._timed = _sample(subject, plan.timed)
        split = subject.data.split
        self._popular = Table(torch.from_numpy(np.bincount(split.train.items, minlength=subject.data.items.num_rows)).double())
        self._users = np.repeat(np.arange(len(split.test)), np.diff(split.test.targets.offsets))
        self._test: dict[tuple[str, float], np.ndarray] = {}

    def __call__(self, setting: Setting) -> Row:
        ranks = {name: self._ranks(setting, steps) for name, steps in (("valid", self._split.valid), ("test", self._split.test))}
        figures = {
            name: {f"ndcg@{CUTOFF}": float(ndcg_at(own, CUTOFF).mean()), f"recall@{CUTOFF}": float(recall_at(own, CUTOFF).mean())}
            for name, own in ranks.items()
        }
        return {"method": setting.method, "budget": setting.budget, **figures, **self._differences(setting), "cost": self._cost(setting)}

    @property
    def _split(self) -> Split:
        return self._subject.data.split

    def _ranks(self, setting: Setting, steps: EvaluationSteps) -> np.ndarray:
        self._take(setting)
        found = self._subject.ranks(self._model, steps)
        if steps is self._split.test:
            self._test[setting.method, setting.budget] = ndcg_at(found, CUTOFF)
        return found

    def _take(self, setting: Setting) -> None:
        self._model.take_efficiency(setting.efficiency)
        if setting.method == POPULAR and setting.efficiency is not None and setting.efficiency.history is not None:
            self._model.pruning = HistoryPruning(setting.efficiency.history, self._popular)

    def _differences(self, setting: Setting) -> dict[str, list[float]]:
        """NDCG@10 on test less that of other settings, ``[estimate, low, high]`` at 95%."""
        own, found = self._test[setting.method, setting.budget], {}
        for name, other in (("less_whole", (WHOLE, 1.0)), ("less_last", (LAST, setting.budget))):
            if other == (setting.method, setting.budget) or setting.method == WHOLE:
                continue
            if other not in self._test:
                self._ranks(next(s for s in settings(self._plan) if (s.method, s.budget) == other), self._split.test)
            interval = paired_mean_difference(own, self._test[other], self._users)
            found[name] = [interval.estimate, interval.low, interval.high]
        return found

    def _encode(self) -> None:
        for history in self._timed:
            self._model.encode(history)

    @torch.no_grad()
    def _cost(self, setting: Setting) -> dict[str, float]:
        """Of one history, on average over the timed ones."""
        self._take(setting)
        count = len(self._timed)
        with Cost() as cost:
            self._encode()
        mine, whole = list[float](), list[float]()
        for _ in range(self._plan.rounds):
            for times, one in ((mine, setting), (whole, Setting(WHOLE, 1.0, None))):
                self._take(one)
                started = time.perf_counter()
                self._encode()
                times.append((time.perf_counter() - started) / count)
        self._take(setting)
        kept = [min(int(self._model.pruned(history).lengths), self._model.max_length) for history in self._timed]
        return {
            "events": float(np.mean(kept)),
            "macs": cost.macs / count,
            "gathered_bytes": cost.gathered_bytes / count,
            "ms": 1e3 * float(np.median(mine)),
            "whole_ms": 1e3 * float(np.median(whole)),
        }


def _sample(subject: Retrievers, count: int) -> list[SequenceBatch]:
    """The whole histories before some test steps, one by one, as a server gets them."""
    split = subject.data.split
    chosen = split.test.sample(count, _DRAWN)
    longest = max(int((chosen.event - chosen.start).max()), 1)
    return [batch for batch, _ in histories(split.data, chosen, longest, 1)]


def trained(plan: TradeoffPlan, subject: Retrievers, seed: int, directory: Path, progress: TrainingProgress) -> Retriever:
    """The model of a seed; its checkpoints stay, so that it is trained once."""
    identity = _identity(plan, subject, seed)
    folder = directory / "training" / sha256_json(identity)[:16]
    trainer = Trainer(plan.training.trainer, folder, progress=progress, context=identity)
    _, model = subject.train(plan.model, plan.rows, seed, plan.training.batch_size, trainer)
    return model.eval()


def _identity(plan: TradeoffPlan, subject: Retrievers, seed: int) -> dict[str, Any]:
    model = plan.model.model_dump(mode="json")
    return {"model": model, "rows": plan.rows, "seed": seed, "training": plan.training.identity(), **subject.identity(plan.model)}


def _key(plan: TradeoffPlan, subject: Retrievers, setting: Setting, seed: int) -> str:
    """Of a cell: by all that decides its result."""
    efficiency = None if setting.efficiency is None else setting.efficiency.model_dump(mode="json")
    one = {"method": setting.method, "budget": setting.budget, "efficiency": efficiency, "timed": plan.timed, "rounds": plan.rounds}
    return sha256_json([_FORMAT, _identity(plan, subject, seed), one])
