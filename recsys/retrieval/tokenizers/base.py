# SPDX-License-Identifier: Apache-2.0
"""What turns items into codes: fitted once on the training period, frozen from then on, and known by a hash."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys.core import components
from recsys.core.config import Config as BaseConfig
from recsys.core.config import parse
from recsys.core.errors import BundleError, ComponentError, ConfigError, DataError
from recsys.core.files import new_directory, read_json, sha256_json, write_json
from recsys.retrieval.code_table import check_codes
from recsys.retrieval.items import ItemTable

FORMAT = 1
_JSON, _TENSORS = "tokenizer.json", "tokenizer.safetensors"
_CHUNK = 4096

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the epochs done, the epochs to do, and figures of the last one."""


class CodeTokenizer(nn.Module, ABC):
    """Items to codes: L levels, level l with ``level_sizes[l]`` codes.

    Built as ``cls(config)`` and registered with ``@register("item_tokenizer", name)``. A subclass reads the items' text embeddings unless
    it overrides `features`, makes its modules in `_build` and learns in `_fit`; everything that it learns must be in its ``state_dict``.

    Attributes:
        width: D, the width of what it reads; None before it is fitted.
    """

    Config: ClassVar[type[BaseConfig]]
    width: int | None = None
    _fingerprint: str | None = None

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config: Any = config

    @property
    @abstractmethod
    def level_sizes(self) -> tuple[int, ...]:
        """How many codes each level has."""

    @property
    def levels(self) -> int:
        """L, which is known before it is fitted."""
        return len(self.level_sizes)

    @abstractmethod
    def _build(self, width: int) -> None:
        """Make the modules and buffers for features of this width, and check that it is one that the configuration allows."""

    @abstractmethod
    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        """Learn from the features of the items that train; torch's own random state is seeded as well."""

    @abstractmethod
    def _encode(self, features_nd: Tensor) -> Tensor:
        """int64 ``[N, L]``, also for N = 0; each row's codes must depend on its own features alone."""

    @abstractmethod
    def _decode(self, codes_nl: Tensor) -> Tensor:
        """float32 ``[N, D]``: the features that the codes stand for."""

    @property
    def fitted(self) -> bool:
        """Whether `fit` or `load` has been."""
        return self._fingerprint is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of everything that was learnt: two tokenizers with the same one give the same codes.

        Raises:
            ConfigError: it is not fitted.
        """
        self._require_fitted()
        assert self._fingerprint is not None
        return self._fingerprint

    def features(self, items: ItemTable, first: int = 0) -> Tensor:
        """float32 ``[N - first, D]``: what it reads of the items from row ``first`` on.

        Raises:
            DataError: the items have no text embeddings, or one that is not finite.
        """
        if items.text is None:
            raise DataError(f"tokenizer {self.config.name!r}: expected items with text embeddings, got none")
        text = items.text[first:]
        finite = text.isfinite().all(1)
        if not bool(finite.all()):
            raise DataError(f"items.text: row {first + int(finite.long().argmin())} is not finite")
        return text.float()

    def fit(self, items: ItemTable, seed: int = 0, progress: Progress | None = None) -> Self:
        """Learn from the warm items, and freeze.

        Args:
            items: the catalogue.
            seed: of everything that is drawn; the caller's random state stays as it is.
            progress: told of every epoch.

        Raises:
            ConfigError: it is fitted already, or does not fit the items.
            DataError: no item is warm, or see `features`.
        """
        if self.fitted:
            raise ConfigError(f"tokenizer {self.config.name!r}: fitted already, and frozen; make a new one")
        features = self.features(items)[items.warm]
        if not len(features):
            raise DataError("items.warm: expected at least one item to fit the tokenizer on, got none")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(features.shape[1])
            self._fit(features, torch.Generator().manual_seed(seed), progress)
        return self._freeze(features.shape[1])

    @torch.no_grad()
    def encode(self, items: ItemTable, first: int = 0) -> Tensor:
        """int64 ``[N - first, L]``: the codes of the items from row ``first`` on, warm or not.

        Raises:
            ConfigError: it is not fitted.
            DataError: the features are not those that it was fitted on; see `features`.
        """
        self._require_fitted()
        features = self.features(items, first)
        if features.shape[1] != self.width:
            raise DataError(f"tokenizer {self.config.name!r}: expected features of width {self.width}, got {features.shape[1]}")
        return torch.cat([self._encode(part) for part in features.split(_CHUNK)])

    @torch.no_grad()
    def decode(self, codes_nl: Tensor) -> Tensor:
        """float32 ``[N, D]``: the features that codes stand for, as near as the codes say.

        Raises:
            ConfigError: it is not fitted.
            DataError: a code is not one of its level.
        """
        self._require_fitted()
        check_codes(codes_nl, self.level_sizes)
        return torch.cat([self._decode(part) for part in codes_nl.split(_CHUNK)])

    @torch.no_grad()
    def nearest_codes(self, features_md: Tensor, codes_l: Tensor, level: int) -> Tensor:
        """int64 ``[M, level_sizes[level]]``: all codes of one level, what suits each of M items best first, the other levels being given.

        By the squared error of what they decode to, unless a subclass knows better.

        Args:
            features_md: ``[M, D]`` of items that share the codes of the other levels.
            codes_l: int64 ``[L]`` their codes.
            level: which one to choose.
        """
        candidates_kl = codes_l.repeat(self.level_sizes[level], 1)
        candidates_kl[:, level] = torch.arange(len(candidates_kl))
        decoded_kd = self.decode(candidates_kl)
        ranked_mk = torch.empty(len(features_md), len(decoded_kd), dtype=torch.int64)
        for row, features_d in enumerate(features_md):
            ranked_mk[row] = (decoded_kd - features_d).square().sum(1).argsort(stable=True)
        return ranked_mk

    def save(self, directory: Path) -> None:
        """Write the directory, whole or not at all: JSON and safetensors.

        Raises:
            ConfigError: it is not fitted.
            FileExistsError: it is there already.
        """
        content = {"format": FORMAT, "config": self.config.model_dump(mode="json"), "width": self.width, "fingerprint": self.fingerprint}
        with new_directory(directory) as root:
            save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, root / _TENSORS)
            write_json(root / _JSON, content)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            BundleError: a file is absent, cannot be read, is of another kind of tokenizer or format, or was changed.
        """
        source = directory / _JSON
        try:
            content = read_json(source)
            if content["format"] != FORMAT:
                raise BundleError(f"{source}: format: expected {FORMAT}, got {content['format']!r}")
            tokenizer = cls(parse(cls.Config, content["config"], source=str(source)))
            tokenizer._build(content["width"])
            tokenizer.load_state_dict(load_file(directory / _TENSORS))
            expected = content["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, ConfigError) as error:
            raise BundleError(f"{directory}: cannot read the tokenizer: {error}") from None
        tokenizer._freeze(content["width"])
        if tokenizer.fingerprint != expected:
            raise BundleError(f"{directory}: the content has the fingerprint {tokenizer.fingerprint}, but {_JSON} says {expected}")
        return tokenizer

    def _freeze(self, width: int) -> Self:
        self.width = width
        self.requires_grad_(False).eval()
        tensors = {name: _digest(tensor) for name, tensor in self.state_dict().items()}
        self._fingerprint = sha256_json([FORMAT, self.config.model_dump(mode="json"), width, tensors])
        return self

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise ConfigError(f"tokenizer {self.config.name!r}: not fitted yet")


def load_tokenizer(directory: Path) -> CodeTokenizer:
    """Read a tokenizer of whatever class; see `CodeTokenizer.load`.

    Raises:
        BundleError: it names no known class; or see `CodeTokenizer.load`.
    """
    try:
        cls: type[CodeTokenizer] = components.get("item_tokenizer", str(read_json(directory / _JSON)["config"]["name"]))
    except (OSError, ValueError, KeyError, TypeError, ComponentError) as error:
        raise BundleError(f"{directory}: cannot read the tokenizer: {error}") from None
    return cls.load(directory)


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    head = f"{content.dtype} {list(content.shape)} ".encode()
    return hashlib.sha256(head + content.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
