# SPDX-License-Identifier: Apache-2.0
"""What retrievers are told of items: text, collaborative vectors and codes, each made once and kept by the hash of what decides it."""

import io
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json, write_bytes
from recsys.data.sequences import SequenceData
from recsys.data.windows import SequenceLoader
from recsys.retrieval.base import CodeRetriever, Retriever
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.codes import code_items
from recsys.retrieval.id_based import IdRetriever
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.tokenizers import CodeTokenizer
from recsys.scaling.judge import Judge
from recsys.scaling.retrieval_data import RetrievalData
from recsys.text import item_vectors
from recsys.training.progress import TrainingProgress
from recsys.training.trainer import Trainer


class ItemSide:
    """The item tables of a study's cells.

    A model bound to the items of its training is told which those are and nothing else; a model of codes has text and codes; every other
    one has text, collaborative vectors, and codes where it reads them.

    Args:
        data: where items and events are.
        directory: for what cells share.
    """

    def __init__(self, data: RetrievalData, directory: Path) -> None:
        self._data, self._directory = data, directory

    def identity(self, config: Config) -> dict[str, Any]:
        """What decides what a model is told, fit for JSON."""
        return {part: self.decided(part) for part in parts(config)}

    def table(self, config: Config, train: SequenceData, rows: int, seed: int, progress: TrainingProgress) -> ItemTable:
        """What a model is told of all items.

        Args:
            config: of the model.
            train: the events of its training.
            rows: how many were asked for.
            seed: of the cell.
            progress: of the collaborative model's training.
        """
        read, cell = parts(config), {"data": self._data.fingerprint, "rows": rows, "seed": seed}
        warm = torch.from_numpy(train.occurring(self._data.items.num_rows))
        text = self.text if "text" in read else None
        vectors = self._collaborative(train, warm, cell, progress) if "collaborative" in read else None
        codes = self._codes(warm, cell) if "codes" in read else None
        return ItemTable(len(warm), warm, text, vectors, codes)

    def outline(self, config: Config, count: int) -> ItemTable:
        """So many items without content, for what a model costs."""
        read, vectors, codes = parts(config), None, None
        text = torch.zeros(count, self._vectors(1).shape[1]) if "text" in read else None
        if "collaborative" in read:
            vectors = torch.zeros(count, self._section("collaborative").model.dim)
        if "codes" in read:
            recipe = self._section("codes")
            sizes = components.build("item_tokenizer", recipe.tokenizer).level_sizes
            sizes = (*sizes, recipe.suffix_size) if recipe.repair == "suffix" else sizes
            codes = CodeTable(torch.zeros(count, len(sizes), dtype=torch.int64), sizes, "outline", recipe.repair)
        return ItemTable(count, torch.ones(count, dtype=torch.bool), text, vectors, codes)

    @cached_property
    def text(self) -> Tensor:
        """float32 ``[N, D_text]``: the embeddings of the items' text."""
        return self._vectors(None)

    def decided(self, part: str) -> dict[str, Any]:
        """What decides ``text``, ``collaborative`` or ``codes``, besides events and seed, fit for JSON.

        Raises:
            ConfigError: the data's configuration says nothing of it.
        """
        section = self._section(part)
        if part == "text":
            return {"encoder": self._encoder.identity, "columns": list(section.columns)}
        if part == "collaborative":
            windows = self._data.config.windows.model_dump(mode="json")
            return {"model": section.model.model_dump(mode="json"), "training": section.training.identity(), "windows": windows}
        codes: dict[str, Any] = section.model_dump(mode="json")
        return codes

    def _section(self, part: str) -> Any:
        section = vars(self._data.config)[part]
        if section is None:
            raise ConfigError(f"data.{part}: a model reads it; expected a section, got null")
        return section

    @cached_property
    def _encoder(self) -> Any:
        return components.build("text_encoder", self._section("text").encoder)

    def _vectors(self, count: int | None) -> Tensor:
        """The text embeddings of the first ``count`` items, or all."""
        columns = self._section("text").columns
        return torch.from_numpy(item_vectors(self._encoder, self._data.items.slice(0, count), columns, self._directory / "text"))

    def _collaborative(self, train: SequenceData, warm: Tensor, cell: Mapping[str, Any], progress: TrainingProgress) -> Tensor:
        """float32 ``[N, D_cf]``: the item vectors of the collaborative model."""
        key = sha256_json({"collaborative": self.decided("collaborative"), **cell})
        file = self._directory / "collaborative" / f"{key}.npy"
        if not file.is_file():
            folder = self._directory / "training" / key[:16]
            recipe = self._section("collaborative").training
            trainer = Trainer(recipe.trainer, folder, progress=progress, context={"shared": key})
            model = self._trained(train, warm, cell["seed"], trainer)
            content = io.BytesIO()
            np.save(content, model.collaborative_vectors().cpu().numpy(), allow_pickle=False)
            write_bytes(file, content.getvalue())
            shutil.rmtree(folder)
        return torch.from_numpy(np.load(file, allow_pickle=False))

    def _trained(self, train: SequenceData, warm: Tensor, seed: int, trainer: Trainer) -> SASRec:
        recipe, split = self._section("collaborative"), self._data.split
        torch.manual_seed(seed)
        model = SASRec(recipe.model, ItemTable(len(warm), warm))
        loader = SequenceLoader(train, model.max_length, recipe.training.batch_size, seed, config=self._data.config.windows)
        trainer.fit(model, loader, Judge(split.data, train, split.valid, len(warm)))
        return model

    def _codes(self, warm: Tensor, cell: Mapping[str, Any]) -> CodeTable:
        """The codes of all items, of a tokenizer that is fitted on the warm ones."""
        recipe = self._section("codes")
        key = sha256_json({"codes": self.decided("codes"), "text": self.decided("text"), **cell})
        file = self._directory / "codes" / f"{key}.safetensors"
        if not file.is_file():
            items = ItemTable(len(warm), warm, self.text)
            tokenizer: CodeTokenizer = components.build("item_tokenizer", recipe.tokenizer)
            table = code_items(tokenizer.fit(items, cell["seed"]), items, recipe.repair, recipe.suffix_size)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            table.save(temporary)
            temporary.replace(file)
        return CodeTable.load(file)


def parts(config: Config) -> tuple[str, ...]:
    """Which of ``text``, ``collaborative`` and ``codes`` a model of this configuration is told; see `ItemSide`."""
    cls: type[Retriever] = components.get("retriever", vars(config)["name"])
    if issubclass(cls, IdRetriever):
        return ()
    codes = ("codes",) if cls.reads_codes(config) else ()
    return ("text", *codes) if issubclass(cls, CodeRetriever) else ("text", "collaborative", *codes)
