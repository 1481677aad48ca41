# SPDX-License-Identifier: Apache-2.0
"""The item tokenizer, fitted on the items of the training period, and every item's codes."""

from dataclasses import replace
from pathlib import Path

from pipelines.graph.step import Context
from pipelines.steps.histories import build_histories
from pipelines.steps.prepared import load_prepared
from pipelines.steps.text import load_text
from recsys.core import components
from recsys.core.files import write_json
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.codes import ItemCodes, code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import CodeTokenizer, load_tokenizer
from recsys.training.progress import counted

_TOKENIZER, _CODES, _ABOUT = "tokenizer", "codes.safetensors", "codes.json"


def fit_tokenizer(recipe: ItemCodes, items: ItemTable, seed: int) -> CodeTokenizer:
    """The item tokenizer, fitted on the items of the training period."""
    tokenizer: CodeTokenizer = components.build("item_tokenizer", recipe.tokenizer)
    with counted(f"item tokenizer {recipe.tokenizer.name}") as progress:
        return tokenizer.fit(items, seed, progress)


def coded(recipe: ItemCodes, tokenizer: CodeTokenizer, items: ItemTable) -> ItemTable:
    """The items with their codes."""
    return replace(items, codes=code_items(tokenizer, items, recipe.repair, recipe.suffix_size))


def load_codes(directory: Path) -> tuple[CodeTokenizer, CodeTable] | None:
    """What the step wrote; None where the recipe has no codes."""
    if not (directory / _CODES).is_file():
        return None
    return load_tokenizer(directory / _TOKENIZER), CodeTable.load(directory / _CODES)


def run(context: Context) -> None:
    """Write ``tokenizer`` and ``codes.safetensors`` where the recipe has codes, and ``codes.json``, which says whether."""
    recipe = context.recipe
    write_json(context.out / _ABOUT, {"tokenizer": None if recipe.codes is None else recipe.codes.tokenizer.name})
    if recipe.codes is None:
        return
    warm = build_histories(load_prepared(context.inputs["splits"])).warm
    items = ItemTable(len(warm), warm, load_text(context.inputs["text"]))
    tokenizer = fit_tokenizer(recipe.codes, items, recipe.seed)
    tokenizer.save(context.out / _TOKENIZER)
    codes = coded(recipe.codes, tokenizer, items).codes
    assert codes is not None
    codes.save(context.out / _CODES)
