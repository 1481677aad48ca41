# SPDX-License-Identifier: Apache-2.0
"""A version of a log of events in a Delta table, as ``recsys ingest --delta`` writes it, beside files of items and users."""

from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.delta import DeltaVersion
from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest.delta import read_log
from recsys.data.ingest.source import read_table


@register("dataset", "delta")
class Delta:
    """Reads one version: what is appended later does not show, and a run of it can be repeated."""

    class Config(BaseConfig):
        """What to read.

        Attributes:
            path: the folder of the Delta table.
            version: of the table.
            items: a Parquet, CSV or TSV file, or a folder of Parquet files.
            users: likewise, where there are any.
            roles: which column plays which role, the YAML file of ``recsys ingest --schema``.
        """

        name: Literal["delta"] = "delta"
        path: Path
        version: NonNegativeInt
        items: Path
        users: Path | None = None
        roles: Path

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> Dataset:
        """The data set of this version, named ``table@v7``; see `recsys.data.ingest.delta.read_log`."""
        config, schema = self.config, DatasetSchema.load(self.config.roles)
        items = read_table(config.items, schema.items.sources)
        users = None if config.users is None else read_table(config.users, schema.users.sources if schema.users else {})
        return read_log(DeltaVersion.open(config.path.resolve(), config.version), schema, items, users)

    def files(self) -> tuple[Path, ...]:
        """Items, users and roles; the table is told by `snapshot`."""
        return tuple(file for file in (self.config.items, self.config.users, self.config.roles) if file is not None)

    def snapshot(self) -> dict[str, Any]:
        """The table's id and the version."""
        return {"table": DeltaVersion.open(self.config.path, self.config.version).id, "version": self.config.version}
