# SPDX-License-Identifier: Apache-2.0
"""Training models at many sizes: architecture × size × amount of data × seed, one line of JSON for each cell as it is finished.

What a cell trains is a `recsys.scaling.subject.Subject`: rankers or retrievers, as the data say. A cell is known by the hash of what
decides its result, so a sweep that was interrupted goes on where it was, and one that was extended trains only what is new. The commit is
written beside the result and is no part of the hash.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, create_model

from recsys.core.components import component_config
from recsys.core.config import Config, parse, set_key
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json
from recsys.ranking.model import Costs
from recsys.scaling.data import ScalingData
from recsys.scaling.lines import Lines, Row
from recsys.scaling.rankers import Rankers
from recsys.scaling.retrieval_data import RetrievalData
from recsys.scaling.retrievers import Retrievers
from recsys.scaling.subject import Subject
from recsys.training.progress import TrainingProgress
from recsys.training.trainer import Trainer, Training

Axis = Literal["params", "flops", "data"]

_FORMAT = 1  # of a cell; another one makes every cell new
_TOLERANCE = 1.5  # how far, as a factor, a solved size may lie from its target


class Size(Config):
    """One size of an architecture.

    Attributes:
        label: its name.
        set: keys of the model's configuration and their values; dotted keys reach into sections.
    """

    label: str
    set: dict[str, Any] = Field(default_factory=dict)


class Architecture(Config):
    """A model and how it grows.

    Attributes:
        label: its name in tables and pictures.
        model: its configuration, a ranker's or a retriever's.
        sizes: by hand; where the axis has targets, the first one's keys are set and a width is solved for each target.
        grow: the keys that a solved width decides, each with its value for the width 1; a list grows in every element.
        multiple: a solved width is a multiple of this.
    """

    label: str
    model: dict[str, Any]
    sizes: tuple[Size, ...] = (Size(label="base"),)
    grow: Mapping[str, int | tuple[int, ...]] = Field(default_factory=lambda: {"dim": 1})
    multiple: int = Field(8, ge=1)

    def at_width(self, width: int) -> dict[str, Any]:
        """The keys of the first size, and those that grow at ``width``."""
        grown = {key: unit * width if isinstance(unit, int) else [part * width for part in unit] for key, unit in self.grow.items()}
        return {**self.sizes[0].set, **grown}


class Targets(Config):
    """Sizes that a solver reaches by choosing a width; none for each architecture's own sizes.

    Attributes:
        targets: dense parameters, or operations of one forward pass.
    """

    targets: tuple[int, ...] = ()


class DataAxis(Config):
    """Amounts of data.

    Attributes:
        rows: training rows, or what else the data count, as `Plan.rows`.
        size: the label of the size that every architecture has; its last one by default.
    """

    rows: tuple[int, ...]
    size: str | None = None


class Plan(Config):
    """What is swept.

    Attributes:
        data: where impressions or histories come from.
        training: of every cell.
        architectures: what is compared.
        seeds: each decides initial weights, the training data drawn and their order.
        rows: how much is trained on, on the axes ``params`` and ``flops``: rows for rankers, users or events for retrievers.
        params: sizes on the axis ``params``.
        flops: sizes on the axis ``flops``.
        amounts: amounts of data on the axis ``data``; null where there is none.
    """

    data: component_config("scaling_data")  # type: ignore[valid-type]
    training: Training
    architectures: tuple[Architecture, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    rows: int = Field(ge=1)
    params: Targets = Targets()
    flops: Targets = Targets()
    amounts: DataAxis | None = None


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        architecture: its label.
        size: its label.
        config: the model's configuration.
        costs: of the model with the data's own tables.
        rows: how much it is trained on.
        seed: of everything that is random.
        key: the hash of what decides the result.
    """

    architecture: str
    size: str
    config: Config
    costs: Costs
    rows: int
    seed: int
    key: str


def subject_of(data: ScalingData | RetrievalData, directory: Path) -> Subject:
    """The models that learn from a source of data.

    Args:
        data: the source.
        directory: of the study, for what its cells share.
    """
    return Retrievers(data, directory / "shared") if isinstance(data, RetrievalData) else Rankers(data)


def cells(plan: Plan, subject: Subject, axis: Axis) -> list[Cell]:
    """All cells of an axis, small ones first, so that a picture of all architectures is there early.

    Raises:
        ConfigError: a configuration is not valid, a target cannot be reached, or the axis is not in the plan; names the architecture.
    """
    labels = [architecture.label for architecture in plan.architectures]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"architectures: the label {twice[0]!r} is used twice")
    amounts = [plan.rows]
    if axis == "data":
        if plan.amounts is None:
            raise ConfigError("amounts: the axis 'data' needs amounts.rows, but the recipe has none")
        amounts = sorted(set(plan.amounts.rows))
    sizes = [found for architecture in plan.architectures for found in _sizes(plan, architecture, subject, axis)]
    sizes.sort(key=lambda found: found[3].flops)
    fixed = {"format": _FORMAT, "training": plan.training.identity()}
    decided = [fixed | dict(subject.identity(config)) | {"model": config.model_dump(mode="json")} for _, _, config, _ in sizes]
    made = []
    for rows, ((label, size, config, costs), own), seed in product(amounts, zip(sizes, decided, strict=True), plan.seeds):
        made.append(Cell(label, size, config, costs, rows, seed, sha256_json(own | {"rows": rows, "seed": seed})))
    return made


def _sizes(plan: Plan, architecture: Architecture, subject: Subject, axis: Axis) -> Iterator[tuple[str, str, Config, Costs]]:
    """Label, size, configuration and costs of each size on the axis."""
    label, sizes = architecture.label, architecture.sizes
    if not sizes or len({size.label for size in sizes}) < len(sizes):
        raise ConfigError(f"architectures: {label}: sizes: expected at least one, each with a label of its own")
    targets = {"params": plan.params.targets, "flops": plan.flops.targets, "data": ()}[axis]
    if targets:
        for target in targets:
            config = solve(architecture, subject, "dense" if axis == "params" else "flops", target)
            yield label, _short(target), config, _costs(architecture, config, subject)
        return
    if axis == "data":
        wanted = (plan.amounts.size if plan.amounts else None) or sizes[-1].label
        sizes = tuple(size for size in sizes if size.label == wanted)
        if not sizes:
            raise ConfigError(f"amounts.size: {label} has no size {wanted!r}, only {', '.join(s.label for s in architecture.sizes)}")
    for size in sizes:
        config = configure(architecture, size.set, subject.kind)
        yield label, size.label, config, _costs(architecture, config, subject)


def _short(count: int) -> str:
    """45000 as ``45k``, 1300000 as ``1.3M``."""
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.4g}{('', 'k', 'M', 'G')[power]}"


def configure(architecture: Architecture, overrides: Mapping[str, Any], kind: str) -> Config:
    """The configuration of the architecture's model, a component of ``kind``, with ``overrides`` by dotted key.

    Raises:
        ConfigError: names the architecture and the key.
    """
    source, model = f"architectures: {architecture.label}", deepcopy(architecture.model)
    for key, value in overrides.items():
        try:
            set_key(model, key, value)
        except ConfigError as error:
            raise ConfigError(f"{source}: {key}: {error}") from None
    config: Config = vars(parse(_model_of(kind), {"model": model}, source=source))["model"]
    return config


@cache
def _model_of(kind: str) -> type[Config]:
    return create_model("Model", __base__=Config, model=(component_config(kind), ...))


def solve(architecture: Architecture, subject: Subject, what: Literal["dense", "flops"], target: int) -> Config:
    """The configuration whose costs come nearest to ``target``, by choosing a width among the multiples of ``architecture.multiple``.

    Costs grow with the width: the smallest one that reaches the target is found by doubling and bisection, and compared with the one below.

    Raises:
        ConfigError: the nearest is more than a factor of 1.5 away, or the keys that grow do not make the model larger.
    """

    def at(steps: int) -> Config:
        return configure(architecture, architecture.at_width(steps * architecture.multiple), subject.kind)

    @cache
    def measure(steps: int) -> int:
        return int(getattr(_costs(architecture, at(steps), subject, tables=False), what))

    high = 1
    while measure(high) < target:
        if measure(2 * high) <= measure(high):
            raise ConfigError(f"architectures: {architecture.label}: grow: {', '.join(architecture.grow)} does not make the model larger")
        high *= 2
    low = high // 2  # below the target, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) < target else (low, middle)
    nearest = min([steps for steps in (low, high) if steps], key=lambda steps: abs(math.log(measure(steps) / target)))
    width, found = nearest * architecture.multiple, measure(nearest)
    if max(found / target, target / found) > _TOLERANCE:
        raise ConfigError(
            f"architectures: {architecture.label}: no width that is a multiple of {architecture.multiple} comes near {target:,} ({what}): "
            f"the nearest is {width} with {found:,}"
        )
    return at(nearest)


def _costs(architecture: Architecture, config: Config, subject: Subject, *, tables: bool = True) -> Costs:
    try:
        return subject.costs(config, tables=tables)
    except ConfigError as error:
        raise ConfigError(f"architectures: {architecture.label}: {error}") from None


def run_cell(cell: Cell, plan: Plan, subject: Subject, folder: Path, progress: TrainingProgress | None = None) -> Row:
    """Train one cell and measure it on the test data; returns its line.

    Args:
        cell: what to train.
        plan: where its training stands.
        subject: what is trained, on its data.
        folder: for checkpoints; an interrupted training goes on from there.
        progress: of the training.
    """
    started = time.perf_counter()
    trainer = Trainer(plan.training.trainer, folder, progress=progress, context={"cell": cell.key})
    history, metrics = subject.train_and_measure(cell.config, cell.rows, cell.seed, plan.training.batch_size, trainer)
    return {
        "key": cell.key,
        "architecture": cell.architecture,
        "size": cell.size,
        "rows": cell.rows,
        "seed": cell.seed,
        "params": {"tables": cell.costs.tables, "dense": cell.costs.dense, "active": cell.costs.active},
        "flops": cell.costs.flops,
        "metrics": metrics,
        "steps": history.steps,
        "epochs": len(history.epochs),
        "curve": history.rows(),
        "seconds": round(time.perf_counter() - started, 3),
        "model": cell.config.model_dump(mode="json"),
    }


def sweep(
    plan: Plan, subject: Subject, wanted: Sequence[Cell], directory: Path, *, commit: str, progress: TrainingProgress | None = None
) -> Iterator[tuple[Cell, Row, bool]]:
    """Train every cell that has no line yet, in order; yields each cell with its line and whether it was trained now.

    Args:
        plan: how.
        subject: what is trained, on its data.
        wanted: which, from `cells`.
        directory: for ``cells.jsonl``, and for the checkpoints of the cell under way.
        commit: of the code; written into the lines.
        progress: of each training.
    """
    lines = Lines(directory / "cells.jsonl")
    done = lines.read()
    for cell in wanted:
        if cell.key in done:
            yield cell, done[cell.key], False
            continue
        folder = directory / "training" / cell.key[:16]
        row = run_cell(cell, plan, subject, folder, progress) | {"commit": commit}
        lines.append(row)
        done[cell.key] = row
        shutil.rmtree(folder)
        yield cell, row, True
