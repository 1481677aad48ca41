# SPDX-License-Identifier: Apache-2.0
"""Item text and its encoders. Importing this package registers them; language models are imported only when used."""

from recsys.text.base import Progress, TextEncoder, Vectors, encode_cached, item_text
from recsys.text.hashing import HashingTextEncoder
from recsys.text.minilm import MiniLM

__all__ = ["HashingTextEncoder", "MiniLM", "Progress", "TextEncoder", "Vectors", "encode_cached", "item_text"]
