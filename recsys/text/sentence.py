# SPDX-License-Identifier: Apache-2.0
"""Text vectors by any model that sentence-transformers loads, by its name or from a folder."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ComponentError
from recsys.core.files import sha256_file
from recsys.text.base import Progress, Vectors


class SentenceConfig(BaseConfig):
    """What all sentence encoders have.

    Attributes:
        batch_size: texts in one forward.
        max_tokens: longer texts are cut.
        device: such as ``cpu``.
    """

    batch_size: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=256, ge=3)
    device: str = "cpu"


class SentenceEncoder(ABC):
    """Texts to vectors of unit length; the model is loaded when the first text is encoded.

    Raises:
        ComponentError: the extra ``text`` is not installed.
    """

    def __init__(self, config: Any) -> None:
        if not find_spec("sentence_transformers"):
            raise ComponentError(f"text_encoder {config.name!r}: needs sentence-transformers: install the extra [text]")
        self.config = config
        self._model: Any = None

    @property
    @abstractmethod
    def identity(self) -> str:
        """See `recsys.text.TextEncoder.identity`."""

    @abstractmethod
    def _load(self) -> Any:
        """The ``SentenceTransformer``."""

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """float32 ``[N, D]`` of unit length. Texts of like length share a batch; the order of the result is that of ``texts``."""
        if self._model is None:
            self._model = self._load()
            self._model.max_seq_length = self.config.max_tokens
        vectors = np.empty((len(texts), self._model.get_embedding_dimension()), dtype=np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        for begin in range(0, len(texts), self.config.batch_size):
            rows = order[begin : begin + self.config.batch_size]
            vectors[rows] = self._model.encode(
                [texts[row] for row in rows],
                batch_size=self.config.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            if progress:
                progress(begin + len(rows), len(texts))
        return vectors


@register("text_encoder", "sentence_transformers")
class SentenceTransformersEncoder(SentenceEncoder):
    """Any model of sentence-transformers; its remote code is never run, and its transformer's weights are read from safetensors alone.

    A folder is known by the SHA-256 of its files; a name by itself and its revision, which should be a commit.

    Raises:
        ComponentError: the model cannot be loaded.
    """

    class Config(SentenceConfig):
        """Besides the `SentenceConfig`.

        Attributes:
            model: a folder, or a name on a hub.
            revision: of a name.
            local_files_only: whether a name must be in the local cache already.
        """

        name: Literal["sentence_transformers"] = "sentence_transformers"
        model: str
        revision: str | None = None
        local_files_only: bool = False

    @property
    def identity(self) -> str:
        """The model's content or name, and the length at which texts are cut."""
        config, folder = self.config, Path(self.config.model)
        if folder.is_dir():
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            content = "".join(f"{path.relative_to(folder)} {sha256_file(path)} " for path in files)
            model = hashlib.sha256(content.encode()).hexdigest()
        else:
            model = f"{config.model}@{config.revision}"
        return f"sentence_transformers {model} max_tokens={config.max_tokens}"

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        config = self.config
        try:
            return SentenceTransformer(
                config.model,
                device=config.device,
                revision=config.revision,
                local_files_only=config.local_files_only,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # its loaders raise whatever they meet
            raise ComponentError(f"text_encoder: cannot load the model {config.model!r}: {error}") from error
