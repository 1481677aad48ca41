# SPDX-License-Identifier: Apache-2.0
"""Text vectors without a language model: hashed words and word pairs, projected at random. For tests and small machines."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.text.base import Progress, Vectors


@register("text_encoder", "hashing")
class HashingTextEncoder:
    """Hashed bags of words and word pairs through a seeded Gaussian projection; cosines approximate those of the bags."""

    class Config(BaseConfig):
        """``dim``: width of the vectors. ``buckets``: of the hash. ``seed``: of the projection."""

        name: Literal["hashing"] = "hashing"
        dim: int = Field(default=128, ge=1)
        buckets: int = Field(default=8192, ge=1)
        seed: int = 0

    def __init__(self, config: Config) -> None:
        # scikit-learn takes a second to import, which whoever only asks for item texts should not pay.
        from sklearn.feature_extraction.text import HashingVectorizer

        self.config = config
        self.identity = config.model_dump_json()
        self._vectorizer = HashingVectorizer(n_features=config.buckets, ngram_range=(1, 2), dtype=np.float32)
        shape = config.buckets, config.dim
        self._projection = np.random.default_rng(config.seed).standard_normal(shape, dtype=np.float32)

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """float32 ``[N, dim]`` of unit length; zero for a text without a word."""
        if not texts:
            return np.empty((0, self.config.dim), dtype=np.float32)
        vectors = np.asarray(self._vectorizer.transform(texts) @ self._projection)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        if progress:
            progress(len(texts), len(texts))
        return vectors
