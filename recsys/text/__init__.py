# SPDX-License-Identifier: Apache-2.0
"""Item text and its encoders. Importing this package registers them; language models are imported only when used."""

from recsys.text.base import ItemText, ItemVectors, Progress, TextEncoder, Vectors, encode_cached, item_text, item_vectors
from recsys.text.hashing import HashingTextEncoder
from recsys.text.minilm import MiniLM
from recsys.text.precomputed import Precomputed
from recsys.text.sentence import SentenceTransformersEncoder

__all__ = [
    "HashingTextEncoder",
    "ItemText",
    "ItemVectors",
    "MiniLM",
    "Precomputed",
    "Progress",
    "SentenceTransformersEncoder",
    "TextEncoder",
    "Vectors",
    "encode_cached",
    "item_text",
    "item_vectors",
]
