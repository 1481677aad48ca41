# SPDX-License-Identifier: Apache-2.0
"""A model over codes and its item tokenizer in a directory, to be put on another catalogue.

What such a model learns belongs to the codes, not to items: on a catalogue that it has never seen it needs the items' texts and nothing
else (RecGPT's zero-shot use, arXiv 2506.06270), or it is trained further there.

```
config.json         the model's configuration, the tokenizer's fingerprint, the text encoder, what was done with collisions, notes
model.safetensors
tokenizer/
```
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config, parse
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import new_directory, read_json, write_json
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.code_table import Repair
from recsys.retrieval.codes import code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import CodeTokenizer, load_tokenizer

FORMAT = 1
_JSON, _TENSORS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer"


class _About(Config):
    """What ``config.json`` says."""

    format: int
    model: component_config("retriever")  # type: ignore[valid-type]
    tokenizer: str
    encoder: str
    levels: int
    repair: Repair
    suffix_size: int
    notes: dict[str, Any]


def save_pretrained(
    model: CodeRetriever, tokenizer: CodeTokenizer, encoder: str, directory: Path, notes: dict[str, Any] | None = None
) -> None:
    """Write the directory, whole or not at all.

    Args:
        model: trained.
        tokenizer: of its codes.
        encoder: the identity of what encoded the items' texts (`recsys.text.TextEncoder.identity`).
        directory: must not exist.
        notes: whatever is worth keeping of how it was trained, as JSON.

    Raises:
        ConfigError: the codes are of another tokenizer.
        FileExistsError: the directory is there already.
    """
    table = model.table
    if table.tokenizer != tokenizer.fingerprint:
        raise ConfigError(f"tokenizer: expected {table.tokenizer}, which made the model's codes, got {tokenizer.fingerprint}")
    about = _About(
        format=FORMAT,
        model=model.config,
        tokenizer=tokenizer.fingerprint,
        encoder=encoder,
        levels=table.levels,
        repair=table.repair,
        suffix_size=table.level_sizes[-1],
        notes=notes or {},
    )
    with new_directory(directory) as root:
        write_json(root / _JSON, about.model_dump(mode="json"))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, root / _TENSORS)
        tokenizer.save(root / _TOKENIZER)


def from_pretrained(directory: Path, items: ItemTable, encoder: str) -> tuple[CodeRetriever, CodeTokenizer, ItemTable]:
    """What `save_pretrained` wrote, on a catalogue of one's own.

    Args:
        directory: of the model.
        items: with what the tokenizer and the model read, such as text embeddings; without codes.
        encoder: the identity of what encoded their texts.

    Returns:
        The model in evaluation mode, its tokenizer, and the items with their codes.

    Raises:
        BundleError: a file is absent, cannot be read or was changed, or the parts do not belong together.
        DataError: the texts are by another encoder, or the items are not what the tokenizer reads, see `CodeTokenizer.encode`.
    """
    about = _about(directory)
    if encoder != about.encoder:
        raise DataError(f"items.text: expected embeddings by {about.encoder}, which the model was trained on, got some by {encoder}")
    try:
        weights = load_file(directory / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise BundleError(f"{directory}: cannot read the model: {error}") from None
    tokenizer = load_tokenizer(directory / _TOKENIZER)
    if tokenizer.fingerprint != about.tokenizer:
        raise BundleError(f"{directory}: the tokenizer is {tokenizer.fingerprint}, but {_JSON} says {about.tokenizer}")
    coded = _coded(items, tokenizer, about)
    model: CodeRetriever = components.build("retriever", about.model, coded)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BundleError(f"{directory}: the weights do not fit the configuration: {error}") from None
    return model.eval(), tokenizer, coded


def pretrained_config(directory: Path) -> tuple[Config, int]:
    """The configuration of the model in a directory, and how many levels its codes have.

    Raises:
        BundleError: it cannot be read.
    """
    about = _about(directory)
    return about.model, about.levels


def _about(directory: Path) -> _About:
    source = directory / _JSON
    try:
        content = read_json(source)
        if content["format"] != FORMAT:
            raise BundleError(f"{source}: format: expected {FORMAT}, got {content['format']!r}")
        return parse(_About, content, source=str(source))
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise BundleError(f"{directory}: cannot read the model: {error}") from None


def _coded(items: ItemTable, tokenizer: CodeTokenizer, about: _About) -> ItemTable:
    codes = code_items(tokenizer, items, about.repair, about.suffix_size)
    return ItemTable(items.count, items.warm, items.text, items.collaborative, codes)
