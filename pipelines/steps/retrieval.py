# SPDX-License-Identifier: Apache-2.0
"""Train the collaborative model and the retriever, and compare them with popularity and item-kNN over the whole catalogue."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.recipe import ItemCodes, Recipe, RetrieverRecipe
from pipelines.steps.data import Prepared
from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json
from recsys.data.sequences import EvaluationSteps, SequenceData, evaluation_steps
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import Scorer, event_ranks, gather_scorer, list_ranks, vector_scorer
from recsys.retrieval.base import CodeRetriever, Retriever, VectorRetriever
from recsys.retrieval.baselines import ItemKNN, Popularity
from recsys.retrieval.catalogue import Catalogue, GatherIndex, Index, check_pair
from recsys.retrieval.codes import code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.models.setrec import SETRec
from recsys.retrieval.tokenizers import CodeTokenizer
from recsys.text import item_vectors
from recsys.training.progress import counted
from recsys.training.tracking import Tracker
from recsys.training.trainer import History, Trainer

_LIST = 100  # places of a list, where a model's scores of all items would cost too much
_VALIDATION_STEPS = 2000  # of the validation period, drawn by seed; 600 chose the wrong epoch (docs/results/quickstart.md)
_DECAYS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of item-kNN: how much less an older event of the history counts


@dataclass(frozen=True)
class Histories:
    """Everything that retrievers are trained and measured on."""

    catalogue: Catalogue
    data: SequenceData
    train: SequenceData
    valid: EvaluationSteps
    test: EvaluationSteps


@dataclass(frozen=True)
class RetrievalResult:
    """Trained retrievers, and the rank of every test event under each model, in the order of the test steps' targets."""

    items: ItemTable
    tokenizer: CodeTokenizer | None
    collaborative: VectorRetriever
    retriever: Retriever
    index: Index
    curves: dict[str, History]
    ranks: dict[str, np.ndarray]


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
    warm = torch.zeros(histories.catalogue.snapshot().count, dtype=torch.bool)
    warm[torch.from_numpy(np.unique(histories.train.items))] = True
    plain = ItemTable(count=len(warm), warm=warm)
    collaborative, first = _train(recipe.collaborative, None, plain, histories, context, run_dir / "collaborative", tracker)
    assert isinstance(collaborative, SASRec)
    items = ItemTable(count=len(warm), warm=warm, text=text, collaborative=collaborative.collaborative_vectors())
    tokenizer = None if recipe.codes is None else fit_tokenizer(recipe.codes, items, recipe.seed)
    if recipe.codes is not None and tokenizer is not None:
        items = replace(items, codes=code_items(tokenizer, items, recipe.codes.repair, recipe.codes.suffix_size))
    retriever, second = _train(recipe.retriever, recipe.index, items, histories, context, run_dir / "retriever", tracker, collaborative)
    _choose_beta(retriever, recipe.lists.betas, histories, recipe.seed)
    index = build_index(recipe.index, retriever, histories.catalogue)
    ranks = {
        recipe.retriever.model.name: model_ranks(retriever, index, histories, histories.test),
        recipe.collaborative.model.name: model_ranks(collaborative, None, histories, histories.test),
    }
    longest = max(retriever.max_length, collaborative.max_length)
    for name, scorer in _baselines(histories, recipe.seed, longest).items():
        ranks[name] = event_ranks(scorer, histories.data, histories.test, longest)
    curves = {recipe.collaborative.model.name: first, recipe.retriever.model.name: second}
    return RetrievalResult(items, tokenizer, collaborative, retriever, index, curves, ranks)


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


def model_ranks(model: Retriever, index: Index | None, histories: Histories, steps: EvaluationSteps) -> np.ndarray:
    """The rank of every target: among all items where that is cheap, else in lists that the index makes, which item vectors do without."""
    if isinstance(model, VectorRetriever):
        return event_ranks(vector_scorer(model), histories.data, steps, model.max_length)
    assert index is not None
    if isinstance(index, GatherIndex):
        return event_ranks(gather_scorer(model, index), histories.data, steps, model.max_length)
    return list_ranks(model, index, histories.catalogue.snapshot(), histories.data, steps, _LIST)


def sample_steps(steps: EvaluationSteps, count: int, seed: int) -> EvaluationSteps:
    """``count`` of the steps, drawn by seed, in their order; all where there are no more."""
    if len(steps) <= count:
        return steps
    return steps.take(np.sort(np.random.default_rng(seed).choice(len(steps), count, replace=False)))


def _train(
    recipe: RetrieverRecipe,
    index: Config | None,
    items: ItemTable,
    histories: Histories,
    context: dict[str, Any],
    run_dir: Path,
    tracker: Tracker,
    collaborative: SASRec | None = None,
) -> tuple[Retriever, History]:
    seed: int = context["seed"]
    torch.manual_seed(seed)
    model: Retriever = components.build("retriever", recipe.model, items)
    context = context | {"windows": recipe.windows.model_dump(mode="json"), "items": _items_digest(items)}
    if isinstance(model, SETRec) and model.config.warm_start:
        if collaborative is None:
            raise ConfigError("setrec: warm_start: there is no collaborative model to start from")
        model.warm_start(collaborative)
    loader = SequenceLoader(histories.train, model.max_length, recipe.training.batch_size, seed, config=recipe.windows)
    steps = sample_steps(histories.valid, _VALIDATION_STEPS, seed)

    # Over codes, which training leaves as they are, so that one index serves every validation.
    built = build_index(index, model, histories.catalogue) if index is not None and isinstance(model, CodeRetriever) else None

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Retriever)
        ranks = model_ranks(module, built, histories, steps)
        return {"recall@10": float(recall_at(ranks, 10).mean()), "ndcg@10": float(ndcg_at(ranks, 10).mean())}

    history = Trainer(recipe.training.trainer, run_dir, tracker=tracker, context=context).fit(model, loader, validate)
    return model.eval(), history


def _items_digest(items: ItemTable) -> str:
    """SHA-256 of all that a model is told of its items, so that no checkpoint goes on with other texts or codes."""
    codes = None if items.codes is None else items.codes.codes
    parts = [None if x is None else x.contiguous().numpy().tobytes() for x in (items.warm, items.text, items.collaborative, codes)]
    return sha256_json([part and hashlib.sha256(part).hexdigest() for part in parts])


def _choose_beta(retriever: Retriever, betas: tuple[float, ...], histories: Histories, seed: int) -> None:
    """Set the weight of the semantic slots to the one with the best NDCG@10 on the validation period."""
    if not isinstance(retriever, SETRec):
        return
    steps = sample_steps(histories.valid, _VALIDATION_STEPS, seed + 1)
    quality = {}
    for beta in betas:
        retriever.set_beta(beta)
        ranks = event_ranks(vector_scorer(retriever), histories.data, steps, retriever.max_length)
        quality[beta] = float(ndcg_at(ranks, 10).mean())
    retriever.set_beta(max(betas, key=lambda beta: quality[beta]))


def _baselines(histories: Histories, seed: int, max_length: int) -> dict[str, Scorer]:
    """Popularity, and item-kNN over all neighbours with the decay that the validation period prefers; they see what the models see."""
    count = histories.catalogue.snapshot().count
    steps = sample_steps(histories.valid, _VALIDATION_STEPS, seed)

    def quality(model: ItemKNN) -> float:
        return float(recall_at(event_ranks(model.scores, histories.data, steps, max_length), 10).mean())

    tried = [ItemKNN(ItemKNN.Config(neighbours=count, decay=decay)).fit(histories.train, count) for decay in _DECAYS]
    neighbours = max(tried, key=quality)
    popularity = Popularity(Popularity.Config()).fit(histories.train, count)
    return {"item_knn": neighbours.scores, "popularity": popularity.scores}
