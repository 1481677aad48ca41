# SPDX-License-Identifier: Apache-2.0
"""What a retriever knows of its items, as files."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.items import ItemTable

_CODES = "codes.safetensors"


def save_item_table(path: Path, items: ItemTable) -> None:
    """Write the tensors to ``path``, and the codes beside it where there are any."""
    tensors = {"warm": items.warm, "text": items.text, "collaborative": items.collaborative}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path)
    if items.codes is not None:
        items.codes.save(path.with_name(_CODES))


def load_item_table(path: Path) -> ItemTable:
    """What `save_item_table` wrote."""
    tensors = load_file(path)
    warm: torch.Tensor = tensors["warm"]
    codes = CodeTable.load(path.with_name(_CODES)) if path.with_name(_CODES).is_file() else None
    return ItemTable(warm.shape[0], warm, tensors.get("text"), tensors.get("collaborative"), codes)
