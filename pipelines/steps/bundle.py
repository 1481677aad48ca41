# SPDX-License-Identifier: Apache-2.0
"""The immutable set that goes live together."""

from pathlib import Path

from pipelines.graph.step import Context
from pipelines.steps.assemble import assemble
from pipelines.steps.evaluate import load_measured
from pipelines.steps.histories import build_histories
from pipelines.steps.index import load_index
from pipelines.steps.prepared import load_prepared
from pipelines.steps.ranker import load_ranking
from pipelines.steps.retriever import load_retriever

_BUNDLE = "bundle"


def bundle_directory(directory: Path) -> Path:
    """The bundle below the step's result."""
    return directory / _BUNDLE


def run(context: Context) -> None:
    """Write ``bundle``, a `recsys.bundle.bundle.Bundle`."""
    inputs = context.inputs
    prepared, measured = load_prepared(inputs["splits"]), load_measured(inputs["evaluate"])
    histories = build_histories(prepared)
    bundle = assemble(
        context.recipe,
        prepared,
        load_ranking(inputs["ranker"]),
        histories,
        load_retriever(inputs["retriever"]),
        load_index(inputs["index"], histories.catalogue),
        rank_weight=measured.rank_weight,
        metrics=measured.metrics,
    )
    bundle.save(bundle_directory(context.out))
