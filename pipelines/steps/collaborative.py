# SPDX-License-Identifier: Apache-2.0
"""Train the collaborative model, whose item vectors become collaborative tokens of the retriever."""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.graph.step import Context
from pipelines.steps.histories import Histories, build_histories
from pipelines.steps.prepared import load_prepared
from pipelines.steps.retrieving import Place, fit, save_curve, seeded
from pipelines.training import Curve
from recsys.bundle.modules import load_module, save_module
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_MODEL, _VECTORS = "model", "vectors.safetensors"


def train_collaborative(recipe: "Recipe", histories: Histories, place: Place) -> tuple[SASRec, Curve]:
    """The collaborative model and the curve of its training; for the arguments see `pipelines.steps.retrieving.fit`."""
    items = _items(histories)
    model = SASRec(recipe.collaborative.model, seeded(items, recipe.seed))
    return model, fit(model, items, recipe, "collaborative", histories, place)


def load_collaborative(directory: Path, histories: Histories) -> tuple[SASRec, Tensor]:
    """What the step wrote: the model, and its vectors of all items, float32 ``[N, D_cf]``."""
    model: SASRec = load_module(directory / _MODEL, "retriever", _items(histories))
    return model, load_file(directory / _VECTORS)["vectors"]


def run(context: Context) -> None:
    """Write the model, the item vectors and the curve."""
    histories, place = build_histories(load_prepared(context.inputs["splits"])), Place.of(context, "collaborative")
    model, curve = train_collaborative(context.recipe, histories, place)
    save_module(context.out / _MODEL, model, extra=model.extra_state())
    save_file({"vectors": model.collaborative_vectors().contiguous()}, context.out / _VECTORS)
    save_curve(curve, place.folder, context.out)


def _items(histories: Histories) -> ItemTable:
    return ItemTable(count=len(histories.warm), warm=histories.warm)
