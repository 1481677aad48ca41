# SPDX-License-Identifier: Apache-2.0
"""What a model of the grid reads of a data set's items: text embeddings, codes, collaborative vectors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.retrieval_quality.data import Dataset
from recsys.core import components
from recsys.core.config import validate
from recsys.core.files import sha256_json
from recsys.retrieval.codes import code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SASRec
from recsys.retrieval.tokenizers import CodeTokenizer, load_tokenizer
from recsys.text import TextEncoder, encode_cached
from recsys.text.hashing import HashingTextEncoder
from recsys.text.minilm import MiniLM
from recsys.training.progress import counted

ENCODERS: Mapping[str, Callable[[], TextEncoder]] = {
    "minilm": lambda: MiniLM(MiniLM.Config()),
    "hashing": lambda: HashingTextEncoder(HashingTextEncoder.Config()),
}


def text_of(data: Dataset, encoder: str) -> Tensor:
    """float32 ``[N, D]``: the items' texts under one of the `ENCODERS`."""
    return torch.from_numpy(encode_cached(ENCODERS[encoder](), data.texts, data.cache / "text"))


def tokenizer_of(data: Dataset, items: ItemTable, encoder: str, config: Mapping[str, Any]) -> CodeTokenizer:
    """An item tokenizer fitted with seed 0 on the items of training; kept on disk."""
    cls: type[CodeTokenizer] = components.get("item_tokenizer", config["name"])
    known = sha256_json([data.name, data.fingerprint, data.columns, data.held_out, data.users, encoder, dict(config)])[:16]
    folder = data.cache / "tokenizers" / known
    if folder.is_dir():
        return load_tokenizer(folder)
    with counted(f"item tokenizer {config['name']}") as progress:
        tokenizer = cls(validate(cls.Config, dict(config))).fit(items, 0, progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    return tokenizer


def items_of(data: Dataset, wanted: Mapping[str, Any], collaborative: SASRec | None) -> ItemTable:
    """The table of a cell.

    Args:
        data: the data set.
        wanted: ``text`` and ``codes`` as in `benchmarks.retrieval_quality.plans.Plan`, where there are any.
        collaborative: the model whose item vectors it holds.
    """
    text = text_of(data, wanted["text"]) if "text" in wanted else None
    vectors = None if collaborative is None else collaborative.collaborative_vectors()
    items = ItemTable(data.count, data.warm, text, vectors)
    if "codes" not in wanted:
        return items
    codes = wanted["codes"]
    tokenizer = tokenizer_of(data, items, wanted["text"], codes["tokenizer"])
    table = code_items(tokenizer, items, codes["repair"], codes.get("suffix_size", 256))
    return ItemTable(data.count, data.warm, text, vectors, table)


def keep(model: SASRec, folder: Path) -> None:
    """Write a model whose item vectors others read."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.model_dump(mode="json")), encoding="utf-8")


def kept(data: Dataset, folder: Path) -> SASRec:
    """Read what `keep` wrote."""
    config = validate(SASRec.Config, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = SASRec(config, ItemTable(data.count, data.warm))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
