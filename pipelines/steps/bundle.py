# SPDX-License-Identifier: Apache-2.0
"""The immutable set that goes live together."""

from pathlib import Path

import numpy as np

from pipelines.graph.step import Context
from pipelines.steps.assemble import assemble
from pipelines.steps.evaluate import load_measured
from pipelines.steps.features import offline
from pipelines.steps.histories import build_histories
from pipelines.steps.index import load_index
from pipelines.steps.prepared import load_prepared
from pipelines.steps.ranker import load_ranking
from pipelines.steps.retriever import load_retriever
from recsys.data.sequences import EvaluationSteps
from recsys.inference import golden
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request

_BUNDLE = "bundle"
_GOLDEN, _K = 4, 10  # recorded requests of known users, and the length of their lists
_STRANGER = "golden-stranger"


def bundle_directory(directory: Path) -> Path:
    """The bundle below the step's result."""
    return directory / _BUNDLE


def run(context: Context) -> None:
    """Write ``bundle``, a `recsys.bundle.bundle.Bundle`."""
    recipe, inputs = context.recipe, context.inputs
    prepared, measured = load_prepared(inputs["splits"]), load_measured(inputs["evaluate"])
    histories = build_histories(prepared)
    bundle = assemble(
        recipe,
        prepared,
        load_ranking(inputs["ranker"]),
        histories,
        load_retriever(inputs["retriever"]),
        load_index(inputs["index"], histories.catalogue),
        rank_weight=measured.rank_weight,
        metrics=measured.metrics,
    )
    reader = offline(recipe.features, prepared.dataset).reader
    bundle.golden = golden.record(Recommender(bundle, reader), _requests(histories.test, recipe.seed))
    bundle.save(bundle_directory(context.out))


def _requests(steps: EvaluationSteps, seed: int) -> list[Request]:
    """A few requests of the test period, drawn by seed, and one of a user whom nobody knows."""
    places = np.random.default_rng(seed).permutation(len(steps))[:_GOLDEN].tolist()
    users = [(steps.user_id[place].as_py(), steps.request_time[place].as_py()) for place in places]
    return [Request(user_id=user, k=_K, at=at) for user, at in [*users, (_STRANGER, users[0][1])]]
