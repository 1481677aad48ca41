# SPDX-License-Identifier: Apache-2.0
"""Models too large for this machine, on paper: built on the meta device from a recipe, counted, and laid out over ranks."""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from recsys.core import components
from recsys.core.config import Config, validate
from recsys.data.spec import InputSpec, TableSpec
from recsys.ranking.model import Costs, Ranker
from recsys.scaling.communication import Workload

_BF16, _FP32 = 2, 4


class Fields(Config):
    """The inputs that a paper model is built for: ``groups`` groups of equally many fields, each field with a table of its own."""

    groups: int = Field(31, ge=1)
    per_group: int = Field(8, ge=1)
    rows: int = Field(1_000_000, ge=1)
    tasks: int = Field(2, ge=1)

    def spec(self) -> InputSpec:
        """As an encoder would lay them out."""
        groups = {f"group{g}": tuple(f"field{g}_{i}" for i in range(self.per_group)) for g in range(self.groups)}
        tables = tuple(TableSpec(name=name, rows=self.rows, bags=(name,)) for group in groups.values() for name in group)
        return InputSpec(tables=tables, tasks=tuple(f"task{i}" for i in range(self.tasks)), groups=groups)


class Cluster(Config):
    """Where it would train.

    Attributes:
        ranks: GPUs.
        batch: rows of a step, over all ranks.
        peak_tflops: dense bf16 operations a second of one GPU, in 10¹².
        mfu: the share of the peak that matrix products reach; published for TokenMixer-Large: up to 0.6, for RankMixer-1B: 0.446.
        memory_gib: of one GPU.
    """

    ranks: int = Field(64, ge=1)
    batch: int = Field(65_536, ge=1)
    peak_tflops: float = Field(989.0, gt=0)
    mfu: float = Field(0.45, gt=0, le=1)
    memory_gib: float = Field(80.0, gt=0)


class PaperRecipe(Config):
    """A model, the inputs it is built for, and where it would train.

    Attributes:
        name: the recipe's.
        model: a ranker's configuration.
        fields: the inputs.
        cluster: the ranks.
    """

    name: str
    model: dict[str, Any]
    fields: Fields = Fields()
    cluster: Cluster = Cluster()


@dataclass(frozen=True)
class Paper:
    """What a paper model would take; memory in bytes for each rank.

    Attributes:
        costs: parameters and operations of a sample's forward pass.
        tables: embedding rows with their row-wise accumulators, shared out over the ranks.
        weights: bf16 weights of the dense part, sharded over the ranks.
        optimizer: fp32 master weights and Adagrad accumulators, sharded.
        gradients: bf16, sharded.
        activations: what the blocks keep for the backward pass of the rank's rows, in bf16.
        step_seconds: three forward passes' operations at the stated share of the peak; communication is not in it.
    """

    costs: Costs
    tables: float
    weights: float
    optimizer: float
    gradients: float
    activations: float
    step_seconds: float

    @property
    def rank_bytes(self) -> float:
        """All of it, for one rank."""
        return self.tables + self.weights + self.optimizer + self.gradients + self.activations


def build_on_meta(recipe: PaperRecipe) -> Ranker:
    """The model, without memory behind it."""
    cls: Any = components.get("ranker", str(recipe.model.get("name")))
    config = validate(cls.Config, recipe.model)
    with torch.device("meta"):
        model: Ranker = cls(config, recipe.fields.spec())
    return model


def on_paper(recipe: PaperRecipe) -> Paper:
    """Count a model and lay it out over its ranks."""
    model, cluster = build_on_meta(recipe), recipe.cluster
    costs = model.costs()
    rows = recipe.fields.rows * recipe.fields.groups * recipe.fields.per_group
    share = 1 / cluster.ranks
    return Paper(
        costs=costs,
        tables=(costs.tables + rows) * _FP32 * share,
        weights=costs.dense * _BF16 * share,
        optimizer=2 * costs.dense * _FP32 * share,
        gradients=costs.dense * _BF16 * share,
        activations=kept_per_row(model) * _BF16 * cluster.batch * share,
        step_seconds=3 * costs.flops * cluster.batch * share / (cluster.peak_tflops * 1e12 * cluster.mfu),
    )


def workload(recipe: PaperRecipe) -> Workload:
    """The recipe's step as one rank sees it."""
    model, fields, cluster = build_on_meta(recipe), recipe.fields, recipe.cluster
    costs = model.costs()
    return Workload(
        rows=fields.rows * fields.groups * fields.per_group,
        fields=fields.groups * fields.per_group,
        width=model.config.embedding.dim,
        flops=costs.flops,
        dense=costs.dense,
        batch=cluster.batch // cluster.ranks,
        kept=kept_per_row(model),
    )


def kept_per_row(model: Ranker) -> float:
    """Numbers that autograd keeps of the interaction for one row: counted on the meta device, as the difference of two batches."""

    def kept(rows: int) -> int:
        fields = torch.empty(rows, sum(model.widths.values()), device="meta", requires_grad=True)
        own = {id(p) for p in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            base: Any = tensor._base if tensor._base is not None else tensor
            if id(base) not in own:
                saved[id(base)] = base
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model.interact(fields)
        count = sum(tensor.numel() for tensor in saved.values())
        del logits
        return count

    return float(kept(3) - kept(2))


def page(papers: dict[str, tuple[PaperRecipe, Paper]]) -> str:
    """The table of ``docs/scale.md``, in Markdown."""
    head = (
        "| model | dense parameters | active | FLOPs a sample, forward | ranks × batch | tables "
        "| weights, gradients, optimizer | activations | all, a rank | step at MFU |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for name, (recipe, paper) in papers.items():
        cluster, costs = recipe.cluster, paper.costs
        dense = paper.weights + paper.gradients + paper.optimizer
        rows.append(
            f"| {name} | {costs.dense / 1e9:.2f} B | {costs.active / 1e9:.2f} B | {costs.flops / 1e9:.1f} G "
            f"| {cluster.ranks} × {cluster.batch // cluster.ranks:,} | {_gib(paper.tables)} | {_gib(dense)} | {_gib(paper.activations)} "
            f"| {_gib(paper.rank_bytes)} of {cluster.memory_gib:g} GiB | {paper.step_seconds:.2f} s at {cluster.mfu:.0%} |"
        )
    return head + "\n".join(rows) + "\n"


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
