# SPDX-License-Identifier: Apache-2.0
"""The formats that bundles have had, and the way from each to the next.

A migration is a function on the JSON that was read; a bundle's files never change, and neither does its hash.

1. The first one: an index named the one user state that it accepts, and the model whose vectors it held.
2. An index accepts several states, and its content comes from a model or a tokenizer (105bb0a).
3. The manifest holds the tokenizer's fingerprint and the signature; every bundle says how it is calibrated, if only by ``none``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from recsys.bundle.signature import signature_of

FORMAT: Final = 3

_INDEX, _FEATURES, _ENCODER, _CALIBRATION = "index/index.json", "features.json", "encoder/encoder.json", "calibration.json"
_TOKENIZER = "tokenizer/tokenizer.json"
_NONE = {"config": {"name": "none"}, "numbers": {}}


@dataclass(frozen=True)
class Stored:
    """The JSON of a bundle.

    Attributes:
        manifest: the content of the manifest.
        documents: the contents of all other JSON files, by their paths.
    """

    manifest: Mapping[str, Any]
    documents: Mapping[str, Any]


def known() -> tuple[int, ...]:
    """The formats that can be read, today's last."""
    return (*_NEXT, FORMAT)


def migrate(stored: Stored) -> Stored:
    """A bundle of a known format in today's.

    Raises:
        KeyError, TypeError: a document does not have the form of its format.
    """
    while (version := stored.manifest["format"]) != FORMAT:
        after = _NEXT[version](stored)
        stored = Stored({**after.manifest, "format": version + 1}, after.documents)
    return stored


def _index_of_content(stored: Stored) -> Stored:
    """1 → 2."""
    index = stored.documents[_INDEX]
    old = dict(index["meta"])
    meta = {"accepts": [old.pop("accepts")], "content_hash": old.pop("model_hash"), "width": old.pop("dim"), **old}
    return Stored(stored.manifest, {**stored.documents, _INDEX: {**index, "meta": meta}})


def _signed(stored: Stored) -> Stored:
    """2 → 3."""
    documents = stored.documents
    tokenizer = documents.get(_TOKENIZER)
    signature = signature_of(documents[_FEATURES], [task["name"] for task in documents[_ENCODER]["config"]["tasks"]])
    about = {"tokenizer": None if tokenizer is None else tokenizer["fingerprint"], "signature": signature.model_dump(mode="json")}
    return Stored({**stored.manifest, **about}, {_CALIBRATION: _NONE, **documents})


_NEXT: dict[int, Callable[[Stored], Stored]] = {1: _index_of_content, 2: _signed}
