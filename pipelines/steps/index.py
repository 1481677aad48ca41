# SPDX-License-Identifier: Apache-2.0
"""The index over the retriever's items."""

from pathlib import Path

from pipelines.graph.step import Context
from pipelines.steps.histories import build_histories
from pipelines.steps.prepared import load_prepared
from pipelines.steps.retriever import load_retriever
from pipelines.steps.retrieving import build_index
from recsys.retrieval.catalogue import Catalogue, Index
from recsys.retrieval.catalogue import load_index as load

_INDEX = "index"


def load_index(directory: Path, catalogue: Catalogue) -> Index:
    """What the step wrote."""
    return load(directory / _INDEX, catalogue.snapshot())


def run(context: Context) -> None:
    """Write ``index``."""
    catalogue = build_histories(load_prepared(context.inputs["splits"])).catalogue
    retriever = load_retriever(context.inputs["retriever"]).retriever
    build_index(context.recipe.index, retriever, catalogue).save(context.out / _INDEX)
