# SPDX-License-Identifier: Apache-2.0
"""From trained models to the bundle that would be served."""

from typing import TYPE_CHECKING, Any

from pipelines.steps.histories import Histories
from pipelines.steps.materialise import versions
from pipelines.steps.prepared import Prepared
from pipelines.steps.ranker import RankingResult
from pipelines.steps.retriever import RetrieverResult
from recsys.bundle.bundle import Bundle, Settings, new_manifest
from recsys.retrieval.catalogue import Index

if TYPE_CHECKING:
    from pipelines.recipe import Recipe


def assemble(
    recipe: "Recipe",
    prepared: Prepared,
    ranking: RankingResult,
    histories: Histories,
    retrieval: RetrieverResult,
    index: Index,
    *,
    rank_weight: float = 0.0,
    metrics: dict[str, Any] | None = None,
) -> Bundle:
    """The bundle of a run.

    Args:
        recipe: of the run.
        prepared: the data.
        ranking: the ranker.
        histories: whose catalogue it is.
        retrieval: the retriever.
        index: over its items.
        rank_weight: λ, once it is chosen.
        metrics: what was measured, once it is.
    """
    sequence, features = ranking.encoder.spec.sequences[0], recipe.features.model_dump(mode="json")
    return Bundle(
        manifest=new_manifest(
            name=recipe.model,
            data_snapshot=prepared.fingerprint,
            features=features,
            feature_versions=versions(recipe.features),
            encoder=ranking.encoder,
            tokenizer=retrieval.tokenizer,
            seed=recipe.seed,
            recipe=recipe,
        ),
        features=features,
        settings=Settings(
            candidates=recipe.lists.candidates,
            rank_weight=rank_weight,
            history_feature=recipe.lists.history_feature,
            history_columns=sequence.keys,
            seen_feature=recipe.lists.seen_feature,
            task=ranking.encoder.spec.tasks[0],
        ),
        metrics=metrics or {},
        items=prepared.dataset.items,
        catalogue=histories.catalogue,
        encoder=ranking.encoder,
        ranker=ranking.ranker,
        retriever=retrieval.retriever,
        item_table=retrieval.items,
        index=index,
        tokenizer=retrieval.tokenizer,
        calibration=ranking.calibration,
    )
