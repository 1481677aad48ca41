# SPDX-License-Identifier: Apache-2.0
"""Train the retriever, or take one that is pretrained, and choose β on the validation period."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipelines.graph.parts import hashes
from pipelines.graph.step import Context
from pipelines.steps.collaborative import load_collaborative
from pipelines.steps.histories import VALIDATION_STEPS, Histories, build_histories
from pipelines.steps.prepared import load_prepared
from pipelines.steps.retrieving import Place, fit, load_curve, save_curve, seeded
from pipelines.steps.text import load_text
from pipelines.steps.tokenizer import load_codes
from pipelines.training import Curve
from recsys.bundle.item_table import load_item_table, save_item_table
from recsys.bundle.modules import load_module, save_module
from recsys.core import components
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.evaluation.retrieval import event_ranks, vector_scorer
from recsys.retrieval.base import Retriever
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.models.setrec import SETRec
from recsys.retrieval.pretrained import from_pretrained
from recsys.retrieval.tokenizers import CodeTokenizer, load_tokenizer

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_MODEL, _ITEMS, _TOKENIZER = "model", "items.safetensors", "tokenizer"


@dataclass(frozen=True)
class RetrieverResult:
    """A retriever on its items.

    Attributes:
        items: the catalogue, as the model reads it.
        tokenizer: of the items' codes, where it reads codes.
        retriever: in evaluation mode.
        curve: of its training, see `recsys.training.history.History.rows`; None where it was not trained.
    """

    items: ItemTable
    tokenizer: CodeTokenizer | None
    retriever: Retriever
    curve: Curve | None

    def save(self, directory: Path) -> None:
        """Write what `load_retriever` reads, except the curve."""
        save_module(directory / _MODEL, self.retriever, extra=self.retriever.extra_state())
        save_item_table(directory / _ITEMS, self.items)
        if self.tokenizer is not None:
            self.tokenizer.save(directory / _TOKENIZER)


def load_retriever(directory: Path) -> RetrieverResult:
    """What the step wrote."""
    items = load_item_table(directory / _ITEMS)
    tokenizer = None if items.codes is None else load_tokenizer(directory / _TOKENIZER)
    return RetrieverResult(items, tokenizer, load_module(directory / _MODEL, "retriever", items), load_curve(directory))


def train_retriever(
    recipe: "Recipe",
    histories: Histories,
    text: Tensor,
    collaborative: SASRec,
    vectors: Tensor,
    codes: tuple[CodeTokenizer, CodeTable] | None,
    place: Place,
) -> RetrieverResult:
    """Build the retriever, train it where the recipe says so, and choose β.

    Args:
        recipe: its retriever, text, index, lists and seed.
        histories: to train and validate on.
        text: float32 ``[N, D_text]``.
        collaborative: the model with which a warm start begins.
        vectors: float32 ``[N, D_cf]``, its vectors of the items.
        codes: of the items, where the recipe has some.
        place: where its training stands.
    """
    items = ItemTable(len(histories.warm), histories.warm, text, vectors, None if codes is None else codes[1])
    retriever, tokenizer, items = _untrained(recipe, items, collaborative, None if codes is None else codes[0])
    curve = None
    if recipe.retriever.training is not None:
        curve = fit(retriever, items, recipe, "retriever", histories, place)
    _choose_beta(retriever, recipe.lists.betas, histories, recipe.seed)
    return RetrieverResult(items, tokenizer, retriever, curve)


def sources(recipe: "Recipe", _: str | None) -> dict[str, Any]:
    """The hashes of the files of what is pretrained."""
    return {} if recipe.retriever.pretrained is None else hashes(recipe.retriever.pretrained)


def run(context: Context) -> None:
    """Write model, items, tokenizer and, of a training, curve and metrics."""
    histories, place = build_histories(load_prepared(context.inputs["splits"])), Place.of(context, "retriever")
    collaborative, vectors = load_collaborative(context.inputs["collaborative"], histories)
    text, codes = load_text(context.inputs["text"]), load_codes(context.inputs["tokenizer"])
    result = train_retriever(context.recipe, histories, text, collaborative, vectors, codes, place)
    result.save(context.out)
    if result.curve is not None:
        save_curve(result.curve, place.folder, context.out)


def _untrained(
    recipe: "Recipe", items: ItemTable, collaborative: SASRec, tokenizer: CodeTokenizer | None
) -> tuple[Retriever, CodeTokenizer | None, ItemTable]:
    """The retriever before its training, the item tokenizer if it reads codes, and the items with them."""
    items = seeded(items, recipe.seed)
    if recipe.retriever.pretrained is not None:
        encoder = components.build("text_encoder", recipe.text.encoder)
        return from_pretrained(recipe.retriever.pretrained, items, encoder.identity)
    model: Retriever = components.build("retriever", recipe.retriever.model, items)
    if isinstance(model, SETRec) and model.config.warm_start:
        model.warm_start(collaborative)
    return model, tokenizer, items


def _choose_beta(retriever: Retriever, betas: tuple[float, ...], histories: Histories, seed: int) -> None:
    """Set the weight of the semantic slots to the one with the best NDCG@10 on the validation period."""
    if not isinstance(retriever, SETRec):
        return
    steps = histories.valid.sample(VALIDATION_STEPS, seed + 1)
    quality = {}
    for beta in betas:
        retriever.set_beta(beta)
        ranks = event_ranks(vector_scorer(retriever), histories.data, steps, retriever.reach)
        quality[beta] = float(ndcg_at(ranks, 10).mean())
    retriever.set_beta(max(betas, key=lambda beta: quality[beta]))
