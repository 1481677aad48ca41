# SPDX-License-Identifier: Apache-2.0
"""The immutable set that goes live together: ranker, retriever, index, catalogue, encoder, feature definitions, settings, metrics.

::

    manifest.json                       identity and the hash of every file
    features.json                       feature definitions, as the feature store wrote them
    settings.json                       `Settings`: how retrieved and ranked scores become one list
    calibration.json                    from the ranker's probability of the task to a calibrated one
    metrics.json                        what evaluation measured
    golden.json  golden/                recorded requests with their features and lists, see `recsys.bundle.golden`
    catalogue.arrow  items.arrow        rows, live bits, version; display attributes by row
    encoder/                            `recsys.data.encode.Encoder`
    ranker/      config.json  model.safetensors
    retriever/   config.json  model.safetensors  items.safetensors
    index/                              the retriever's item vectors

Nothing in it is pickled. `Bundle.load` refuses a bundle whose files do not have the hashes of its manifest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from recsys.bundle.environment import code_commit, environment
from recsys.bundle.golden import Golden, load_golden
from recsys.bundle.item_table import load_item_table, save_item_table
from recsys.bundle.manifest import MANIFEST, Manifest, hash_files, opened
from recsys.bundle.modules import load_module, save_module
from recsys.bundle.rules import Rules
from recsys.bundle.signature import signature_of
from recsys.bundle.tables import read_table, write_table
from recsys.core.config import Config, parse
from recsys.core.errors import BundleError
from recsys.core.files import new_directory, read_json, write_json
from recsys.data.encode import Encoder
from recsys.embedding.quantize import quantize as int8
from recsys.ranking.calibration import Calibrator, NoCalibration, from_state
from recsys.ranking.model import Ranker
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue import Catalogue, CodeIndex, Index, check_pair, load_index
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import CodeTokenizer, load_tokenizer


class Settings(Config):
    """How a list is made of a bundle's models.

    Attributes:
        candidates: how many items the retriever hands to the ranker.
        rank_weight: λ in ``score = retriever's log-probability + λ · log P(label)``; 0 keeps the retriever's order.
        history_feature: the user feature that holds the last item ids, oldest first.
        history_columns: it and the lists aligned with it, as the encoder reads them.
        seen_feature: the feature of the service ``seen`` that holds the ids not to be recommended again.
        task: the ranker's task that enters the score.
        rules: of lists whose request says nothing else; absent in older bundles.
    """

    candidates: int = 100
    rank_weight: float = 0.0
    history_feature: str
    history_columns: tuple[str, ...]
    seen_feature: str
    task: str
    rules: Rules = Rules()


@dataclass
class Bundle:
    """A loaded bundle: all parts, built and in evaluation mode."""

    manifest: Manifest
    features: dict[str, Any]
    settings: Settings
    metrics: dict[str, Any]
    items: pa.Table
    catalogue: Catalogue
    encoder: Encoder
    ranker: Ranker
    retriever: Retriever
    item_table: ItemTable
    index: Index
    tokenizer: CodeTokenizer | None = None
    calibration: Calibrator = field(default_factory=lambda: NoCalibration(NoCalibration.Config()))
    golden: Golden | None = None

    def save(self, directory: Path) -> Manifest:
        """Write the bundle whole or not at all; returns the manifest with the files' hashes.

        Raises:
            BundleError: the parts do not belong together.
            FileExistsError: the directory is there already: a bundle never changes.
        """
        self._check_together(directory)
        with new_directory(directory) as root:
            write_json(root / "features.json", self.features)
            write_json(root / "settings.json", self.settings.model_dump(mode="json"))
            write_json(root / "calibration.json", self.calibration.state())
            write_json(root / "metrics.json", self.metrics)
            write_table(root / "items.arrow", self.items)
            self.catalogue.save(root / "catalogue.arrow")
            self.encoder.save(root / "encoder")
            save_module(root / "ranker", self.ranker)
            save_module(root / "retriever", self.retriever, extra=self.retriever.extra_state())
            save_item_table(root / "retriever" / "items.safetensors", self.item_table)
            self.index.save(root / "index")
            if self.tokenizer is not None:
                self.tokenizer.save(root / "tokenizer")
            if self.golden is not None:
                self.golden.save(root)
            manifest = Manifest(**{**self.manifest.model_dump(), "files": hash_files(root)})
            write_json(root / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    @classmethod
    def load(cls, directory: Path, *, mmap: bool = False, quantize: Literal["int8"] | None = None) -> "Bundle":
        """Verify every hash, then build every part. A bundle of an older format is migrated; its files stay as they are.

        Args:
            directory: of the bundle.
            mmap: map what is only read, so that several processes of one host share its pages: weights, item vectors, texts of items,
                vocabularies. The models are for inference alone then, and the files must stay as they are.
            quantize: ``int8`` keeps the ranker's tables in a quarter of the memory, see `recsys.embedding.quantize.QuantizedTables`.

        Raises:
            BundleError: a file is absent, foreign or changed, the format is unknown, or the parts do not belong together.
        """
        with opened(directory) as (manifest, root):
            bundle = cls._build(manifest, root, mmap, quantize)
        bundle._check_together(directory)
        return bundle

    @classmethod
    def _build(cls, manifest: Manifest, directory: Path, mmap: bool, quantize: Literal["int8"] | None) -> "Bundle":
        encoder = Encoder.load(directory / "encoder", mmap=mmap)
        if encoder.fingerprint() != manifest.encoder:
            raise BundleError(f"{directory}: encoder {encoder.fingerprint()} is not the manifest's {manifest.encoder}")
        catalogue = Catalogue.load(directory / "catalogue.arrow", mmap=mmap)
        items = load_item_table(directory / "retriever" / "items.safetensors")
        ranker: Ranker = load_module(directory / "ranker", "ranker", encoder.spec, mmap=mmap or quantize is not None)
        if quantize is not None:
            ranker.register_module("tables", int8(ranker.tables))
        retriever = load_module(directory / "retriever", "retriever", items, mmap=mmap)
        return cls(
            manifest=manifest,
            features=read_json(directory / "features.json"),
            settings=parse(Settings, read_json(directory / "settings.json"), source=str(directory / "settings.json")),
            metrics=read_json(directory / "metrics.json"),
            items=read_table(directory / "items.arrow", mmap=mmap),
            catalogue=catalogue,
            encoder=encoder,
            ranker=ranker,
            retriever=retriever,
            item_table=items,
            index=load_index(directory / "index", catalogue.snapshot(), mmap=mmap),
            tokenizer=None if items.codes is None else load_tokenizer(directory / "tokenizer"),
            calibration=from_state(read_json(directory / "calibration.json")),
            golden=load_golden(directory),
        )

    def _check_together(self, directory: Path) -> None:
        """Hold that the index is over this retriever's items, and that the tokenizer is that of their codes and of histories of codes."""
        check_pair(self.retriever, self.index)
        codes, tokenizer = self.item_table.codes, None if self.tokenizer is None else self.tokenizer.fingerprint
        if (None if codes is None else codes.tokenizer) != tokenizer:
            raise BundleError(f"{directory}: the codes are of the tokenizer {codes and codes.tokenizer}, but the bundle has {tokenizer}")
        for view in self.features.get("views", ()):
            for feature in view["features"]:
                if (stamped := feature.get("tokenizer")) not in (None, tokenizer):
                    raise BundleError(
                        f"{directory}: feature {feature['name']!r} holds codes of the tokenizer {stamped}, but the bundle has {tokenizer}"
                    )
        if isinstance(self.index, CodeIndex):
            if codes is None or not torch.equal(self.index.table.codes, codes.codes):
                raise BundleError(f"{directory}: the index does not hold the codes of the items")
        elif self.index.meta.content_hash != self.retriever.fingerprint():
            raise BundleError(
                f"{directory}: the index is of the model {self.index.meta.content_hash}, expected {self.retriever.fingerprint()}"
            )
        self._check_manifest(directory, tokenizer)
        names = {feature["name"] for view in self.features.get("views", ()) for feature in view["features"]}
        if self.calibration.column not in {None, *names}:
            raise BundleError(f"{directory}: the calibration is by {self.calibration.column!r}, which no feature view has")

    def _check_manifest(self, directory: Path, tokenizer: str | None) -> None:
        """Hold that the manifest speaks of these parts."""
        said: dict[str, tuple[object, object]] = {
            "tokenizer": (self.manifest.tokenizer, tokenizer),
            "signature": (self.manifest.signature, signature_of(self.features, self.encoder.spec.tasks)),
        }
        for name, (found, expected) in said.items():
            if found != expected:
                raise BundleError(f"{directory}: {MANIFEST} says {name} {found}, but the parts have {expected}")


def new_manifest(
    *,
    name: str,
    data_snapshot: str,
    features: Mapping[str, Any],
    feature_versions: dict[str, str],
    encoder: Encoder,
    tokenizer: CodeTokenizer | None,
    seed: int,
    recipe: Config,
) -> Manifest:
    """The manifest of a bundle about to be saved; its files are filled in by `Bundle.save`."""
    return Manifest(
        name=name,
        created=datetime.now(UTC),
        code_commit=code_commit(),
        data_snapshot=data_snapshot,
        feature_versions=feature_versions,
        encoder=encoder.fingerprint(),
        tokenizer=None if tokenizer is None else tokenizer.fingerprint,
        signature=signature_of(features, encoder.spec.tasks),
        seed=seed,
        environment=environment(),
        recipe=recipe.model_dump(mode="json"),
        files={},
    )
