# SPDX-License-Identifier: Apache-2.0
"""Frozen text embeddings of all items."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.graph.parts import files_of
from pipelines.graph.step import Context
from pipelines.steps.prepared import load_prepared
from recsys.core import components
from recsys.text import ItemText, item_vectors

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

_VECTORS = "text.safetensors"


def text_vectors(text: ItemText, items: pa.Table, cache: Path) -> Tensor:
    """Frozen text embeddings of all items, float32 ``[N, D_text]``, in the order of the catalogue's rows."""
    encoder = components.build("text_encoder", text.encoder)
    return torch.from_numpy(item_vectors(encoder, items, text.columns, cache))


def load_text(directory: Path) -> Tensor:
    """What the step wrote."""
    return load_file(directory / _VECTORS)["text"]


def sources(recipe: "Recipe", _: str | None) -> dict[str, Any]:
    """The hashes of the files that the encoder's configuration names."""
    return files_of({"encoder": recipe.text.encoder})


def run(context: Context) -> None:
    """Write ``text.safetensors``."""
    items = load_prepared(context.inputs["splits"]).dataset.items
    vectors = text_vectors(context.recipe.text, items, context.home / "cache")
    save_file({"text": vectors.contiguous()}, context.out / _VECTORS)
