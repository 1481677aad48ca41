# SPDX-License-Identifier: Apache-2.0
"""A data set that ``recsys ingest`` wrote."""

from pathlib import Path
from typing import Literal

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.data.dataset import Dataset
from recsys.data.ingest.store import read_dataset


@register("dataset", "ingested")
class Ingested:
    """Reads a directory of ``recsys ingest`` and verifies its fingerprint."""

    class Config(BaseConfig):
        """``path``: the directory."""

        name: Literal["ingested"] = "ingested"
        path: Path

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> Dataset:
        """The data set.

        Raises:
            DataError: the directory is absent, incomplete, or was changed after it was written.
        """
        return read_dataset(self.config.path)

    def files(self) -> tuple[Path, ...]:
        """The directory."""
        return (self.config.path,)
