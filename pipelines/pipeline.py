# SPDX-License-Identifier: Apache-2.0
"""The steps of a run and how they depend on each other, from raw events to a promoted bundle.

Each says what part of the recipe it reads: only that, its code, its sources and the content of its inputs make its key.
"""

from typing import Any

from pydantic import BaseModel

from pipelines.graph import Graph, Step
from pipelines.recipe import Recipe
from pipelines.steps import (
    bundle,
    collaborative,
    evaluate,
    features,
    index,
    ingest,
    materialise,
    promote,
    ranker,
    retriever,
    splits,
    text,
    tokenizer,
    validate,
)
from recsys.core import components
from recsys.data.datasets.base import Partitioned, dataset_source
from recsys.retrieval.base import CodeRetriever


def _fields(section: BaseModel) -> dict[str, Any]:
    """The content of a section of the recipe without its type, whose module knows all of the recipe's."""
    return dict(vars(section))


def _splits(recipe: Recipe) -> dict[str, Any]:
    joined = recipe.dataset if isinstance(dataset_source(recipe.dataset), Partitioned) else None
    return {"dataset": joined, "split": _fields(recipe.split), "seed": recipe.seed}


def _retriever(recipe: Recipe) -> dict[str, Any]:
    """The index counts where validation asks it, the text encoder where what is pretrained wants to know it."""
    asked = issubclass(components.get("retriever", recipe.retriever.model.name), CodeRetriever)
    pretrained = recipe.retriever.pretrained is not None
    return {
        "retriever": _fields(recipe.retriever),
        "betas": recipe.lists.betas,
        "index": recipe.index if asked else None,
        "encoder": recipe.text.encoder if pretrained else None,
        "seed": recipe.seed,
    }


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    return {
        "ranker": recipe.ranker.model.name,
        "tasks": recipe.encoder.tasks,
        "collaborative": recipe.collaborative.model.name,
        "retriever": recipe.retriever.model.name,
        "features": recipe.features,
        "lists": _fields(recipe.lists),
        "evaluation": _fields(recipe.evaluation),
        "seed": recipe.seed,
    }


GRAPH = Graph(
    (
        Step("ingest", ingest.run, (), lambda r: {"dataset": r.dataset}, partitioned=True, sources=ingest.sources),
        Step(
            "validate",
            validate.run,
            ("ingest",),
            lambda r: {"checks": r.checks},
            partitioned=True,
            looks_back=validate.LOOKS_BACK,
        ),
        Step("splits", splits.run, ("ingest", "validate"), _splits, sources=ingest.entity_sources),
        Step("features", features.run, ("splits",), lambda r: {"features": r.features}),
        Step("text", text.run, ("splits",), lambda r: {"text": r.text}, sources=text.sources),
        Step("tokenizer", tokenizer.run, ("splits", "text"), lambda r: {"codes": r.codes, "seed": r.seed}),
        Step(
            "ranker",
            ranker.run,
            ("features",),
            lambda r: {"encoder": r.encoder, "ranker": _fields(r.ranker), "seed": r.seed},
        ),
        Step(
            "collaborative",
            collaborative.run,
            ("splits",),
            lambda r: {"collaborative": _fields(r.collaborative), "seed": r.seed},
        ),
        Step("retriever", retriever.run, ("splits", "text", "tokenizer", "collaborative"), _retriever, sources=retriever.sources),
        Step("index", index.run, ("splits", "retriever"), lambda r: {"index": r.index}),
        Step("materialise", materialise.run, ("splits",), lambda r: {"features": r.features}, stands=materialise.stands),
        Step(
            "evaluate",
            evaluate.run,
            ("splits", "text", "ranker", "collaborative", "retriever", "index", "materialise"),
            _evaluate,
        ),
        Step("bundle", bundle.run, ("splits", "ranker", "retriever", "index", "evaluate"), lambda r: {"recipe": r.model_dump(mode="json")}),
        Step(
            "promote",
            promote.run,
            ("splits", "evaluate", "bundle"),
            lambda r: {
                "model": r.model,
                "gates": r.gates,
                "decisions": None if r.decisions is None else str(r.decisions),
                "evaluation": _fields(r.evaluation),
                "seed": r.seed,
            },
            stands=promote.stands,
        ),
    ),
    ingest.partitions,
)
NAMES = tuple(step.name for step in GRAPH.order)
