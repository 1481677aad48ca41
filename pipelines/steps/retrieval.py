# SPDX-License-Identifier: Apache-2.0
"""Train the collaborative model and the retriever, and compare them with each other and with baselines over the whole catalogue."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.recipe import Recipe, RetrieverRecipe
from pipelines.steps.data import Prepared
from recsys.core import components
from recsys.core.config import Config
from recsys.data.sequences import EvaluationSteps, SequenceData, evaluation_steps
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import Scorer, event_ranks, model_ranks, slices, vector_scorer
from recsys.evaluation.tuned_baselines import tuned_item_knn, tuned_text_knn
from recsys.retrieval.base import CodeRetriever, Retriever, VectorRetriever
from recsys.retrieval.baselines import Popularity, RepeatLast
from recsys.retrieval.catalogue import Catalogue, Index, check_pair
from recsys.retrieval.codes import ItemCodes, code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.models.setrec import SETRec
from recsys.retrieval.pretrained import from_pretrained
from recsys.retrieval.tokenizers import CodeTokenizer
from recsys.text import item_vectors
from recsys.training.progress import counted
from recsys.training.tracking import Tracker
from recsys.training.trainer import History, Trainer

_VALIDATION_STEPS = 2000  # of the validation period, drawn by seed; 600 chose the wrong epoch (docs/results/quickstart.md)


@dataclass(frozen=True)
class Histories:
    """Everything that retrievers are trained and measured on."""

    catalogue: Catalogue
    data: SequenceData
    train: SequenceData
    valid: EvaluationSteps
    test: EvaluationSteps

    def slices(self) -> dict[str, np.ndarray]:
        """Which test targets are of which kind, see `recsys.evaluation.retrieval.slices`."""
        return slices(self.data, self.train, self.test, self.catalogue.snapshot().count)


@dataclass(frozen=True)
class RetrievalResult:
    """Trained retrievers, and the rank of every test event under each model, in the order of the test steps' targets.

    ``ranks`` are in lists without what the user has seen; ``with_seen`` in lists with it, empty where no target is a repeat.
    """

    items: ItemTable
    tokenizer: CodeTokenizer | None
    collaborative: VectorRetriever
    retriever: Retriever
    index: Index
    curves: dict[str, History]
    ranks: dict[str, np.ndarray]
    with_seen: dict[str, np.ndarray]


def build_histories(prepared: Prepared) -> Histories:
    """The catalogue of all items, and the users' histories with the steps of each period."""
    catalogue = Catalogue(prepared.dataset.items.column("item_id"))
    data = SequenceData.from_events(prepared.events, catalogue.rows)
    split, end = prepared.split, prepared.end
    return Histories(
        catalogue=catalogue,
        data=data,
        train=data.before(split.valid_start),
        valid=evaluation_steps(data, split.valid_start, split.test_start),
        test=evaluation_steps(data, split.test_start, end),
    )


def text_vectors(recipe: Recipe, prepared: Prepared, cache: Path) -> Tensor:
    """Frozen text embeddings of all items, float32 ``[N, D_text]``, in the order of the catalogue's rows."""
    encoder = components.get("text_encoder", recipe.text.encoder.name)(recipe.text.encoder)
    return torch.from_numpy(item_vectors(encoder, prepared.dataset.items, recipe.text.columns, cache))


def train_retrievers(
    recipe: Recipe, prepared: Prepared, histories: Histories, text: Tensor, run_dir: Path, tracker: Tracker
) -> RetrievalResult:
    """Train the collaborative model, then the retriever on its item vectors; choose β on the validation period."""
    context = prepared.context(recipe.seed)
    warm = torch.from_numpy(histories.train.occurring(histories.catalogue.snapshot().count))
    plain = ItemTable(count=len(warm), warm=warm)
    collaborative = SASRec(recipe.collaborative.model, _seeded(plain, recipe.seed))
    curves = {"sasrec": _fit(collaborative, recipe.collaborative, None, plain, histories, context, run_dir / "collaborative", tracker)}
    items = ItemTable(count=len(warm), warm=warm, text=text, collaborative=collaborative.collaborative_vectors())
    retriever, tokenizer, items = _retriever(recipe, items, collaborative)
    if recipe.retriever.training is not None:
        history = _fit(retriever, recipe.retriever, recipe.index, items, histories, context, run_dir / "retriever", tracker)
        curves[recipe.retriever.model.name] = history
    _choose_beta(retriever, recipe.lists.betas, histories, recipe.seed)
    index = build_index(recipe.index, retriever, histories.catalogue)
    baselines = _baselines(histories, text, recipe.seed, max(retriever.max_length, collaborative.max_length))
    models = {recipe.retriever.model.name: (retriever, index), recipe.collaborative.model.name: (collaborative, None)}
    ranks = _ranks(models, baselines, histories, exclude_seen=True)
    with_seen = _ranks(models, baselines, histories, exclude_seen=False) if histories.slices()["repeated"].any() else {}
    return RetrievalResult(items, tokenizer, collaborative, retriever, index, curves, ranks, with_seen)


def _ranks(
    models: Mapping[str, tuple[Retriever, Index | None]], baselines: Mapping[str, Scorer], histories: Histories, *, exclude_seen: bool
) -> dict[str, np.ndarray]:
    """The rank of every test event under every model and baseline, which see equally long histories."""
    data, test, view = histories.data, histories.test, histories.catalogue.snapshot()
    longest = max(model.max_length for model, _ in models.values())
    ranks = {name: model_ranks(model, data, test, view, index, exclude_seen=exclude_seen) for name, (model, index) in models.items()}
    return ranks | {name: event_ranks(scorer, data, test, longest, exclude_seen=exclude_seen) for name, scorer in baselines.items()}


def _retriever(recipe: Recipe, items: ItemTable, collaborative: SASRec) -> tuple[Retriever, CodeTokenizer | None, ItemTable]:
    """The retriever before its training, the item tokenizer if it reads codes, and the items with them."""
    config = recipe.retriever.model
    if recipe.retriever.pretrained is not None:
        encoder = components.build("text_encoder", recipe.text.encoder)
        return from_pretrained(recipe.retriever.pretrained, items, encoder.identity)
    tokenizer = None if recipe.codes is None else fit_tokenizer(recipe.codes, items, recipe.seed)
    if recipe.codes is not None and tokenizer is not None:
        items = coded(recipe.codes, tokenizer, items)
    model: Retriever = components.build("retriever", config, _seeded(items, recipe.seed))
    if isinstance(model, SETRec) and model.config.warm_start:
        model.warm_start(collaborative)
    return model, tokenizer, items


def _seeded(items: ItemTable, seed: int) -> ItemTable:
    """The items, with torch's random state set for a model that is built over them."""
    torch.manual_seed(seed)
    return items


def coded(recipe: ItemCodes, tokenizer: CodeTokenizer, items: ItemTable) -> ItemTable:
    """The items with their codes."""
    return replace(items, codes=code_items(tokenizer, items, recipe.repair, recipe.suffix_size))


def fit_tokenizer(recipe: ItemCodes, items: ItemTable, seed: int) -> CodeTokenizer:
    """The item tokenizer, fitted on the items of the training period."""
    tokenizer: CodeTokenizer = components.build("item_tokenizer", recipe.tokenizer)
    with counted(f"item tokenizer {recipe.tokenizer.name}") as progress:
        return tokenizer.fit(items, seed, progress)


def build_index(config: Config, retriever: Retriever, catalogue: Catalogue) -> Index:
    """The index over the retriever's items, checked to fit it."""
    cls: type[Index] = components.get("index", vars(config)["name"])
    check_pair(retriever, cls)
    return cls.over(config, retriever, catalogue.snapshot())


def _fit(
    model: Retriever,
    recipe: RetrieverRecipe,
    index: Config | None,
    items: ItemTable,
    histories: Histories,
    context: dict[str, Any],
    run_dir: Path,
    tracker: Tracker,
) -> History:
    """Train a model in place."""
    assert recipe.training is not None
    seed: int = context["seed"]
    context = context | {"windows": recipe.windows.model_dump(mode="json"), "items": items.digest()}
    if recipe.pretrained is not None:
        context |= {"pretrained": model.fingerprint()}
    loader = SequenceLoader(histories.train, model.max_length, recipe.training.batch_size, seed, config=recipe.windows)
    steps, view = histories.valid.sample(_VALIDATION_STEPS, seed), histories.catalogue.snapshot()

    # Over codes, which training leaves as they are, so that one index serves every validation.
    built = build_index(index, model, histories.catalogue) if index is not None and isinstance(model, CodeRetriever) else None

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Retriever)
        ranks = model_ranks(module, histories.data, steps, view, built)
        return {"recall@10": float(recall_at(ranks, 10).mean()), "ndcg@10": float(ndcg_at(ranks, 10).mean())}

    return Trainer(recipe.training.trainer, run_dir, tracker=tracker, context=context).fit(model, loader, validate)


def _choose_beta(retriever: Retriever, betas: tuple[float, ...], histories: Histories, seed: int) -> None:
    """Set the weight of the semantic slots to the one with the best NDCG@10 on the validation period."""
    if not isinstance(retriever, SETRec):
        return
    steps = histories.valid.sample(_VALIDATION_STEPS, seed + 1)
    quality = {}
    for beta in betas:
        retriever.set_beta(beta)
        ranks = event_ranks(vector_scorer(retriever), histories.data, steps, retriever.reach)
        quality[beta] = float(ndcg_at(ranks, 10).mean())
    retriever.set_beta(max(betas, key=lambda beta: quality[beta]))


def _baselines(histories: Histories, text: Tensor, seed: int, max_length: int) -> dict[str, Scorer]:
    """What the models must beat, with the settings that the validation period prefers; they see what the models see."""
    train, count = histories.train, len(text)
    steps = histories.valid.sample(_VALIDATION_STEPS, seed)

    def quality(scorer: Scorer) -> float:
        return float(recall_at(event_ranks(scorer, histories.data, steps, max_length), 10).mean())

    return {
        "item_knn": tuned_item_knn(train, count, quality).scores,
        "text_knn": tuned_text_knn(train, text, quality).scores,
        "repeat_last": RepeatLast(RepeatLast.Config()).fit(train, count).scores,
        "popularity": Popularity(Popularity.Config()).fit(train, count).scores,
    }
