# SPDX-License-Identifier: Apache-2.0
"""What an `Encoder` produces and a ranker consumes: tables, aligned sequences, dense columns and tasks. Holds no torch."""

from collections.abc import Collection, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from recsys.core.config import Config, Problem
from recsys.core.errors import unknown


class TableSpec(Config):
    """One embedding table.

    Attributes:
        name: the table.
        rows: row 0 stands for "no value" (NULL, MISSING, EXPIRED, ERROR), row 1 for a value unknown to the vocabulary.
        bags: the keys of `RankingBatch.sparse` that are pooled from this table.
        sequences: the keys of `RankingBatch.sequences` that are looked up, unpooled, in this table.
        ids: what the keys hold: rows, or raw 64-bit ids that the table itself gives rows to (`recsys.embedding.ids.ManagedIds`).

    A table is read either pooled or unpooled, never both: TorchRec cannot share weights between the two kinds of collection.
    """

    name: str
    rows: int
    bags: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    ids: Literal["rows", "raw"] = "rows"

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.bags) == bool(self.sequences):
            raise ValueError(f"table {self.name!r}: expected either bags or sequences, got {self.bags} and {self.sequences}")
        return self


class SequenceSpec(Config):
    """One history: unpooled keys of equal lengths per row, and the key of the candidate that is compared with it.

    Attributes:
        name: the field that the pooled sequence becomes.
        keys: aligned keys of `RankingBatch.sequences`, the item first.
        target: a key of `RankingBatch.sequences` with one value per row, which shares its table with ``keys[0]``.
    """

    name: str
    keys: tuple[str, ...]
    target: str


class InputSpec(Config):
    """All inputs of a ranker, in the order of the batch.

    Attributes:
        tables: the embedding tables.
        sequences: the histories.
        dense: the dense columns.
        tasks: the labels.
        groups: which of the `fields` belong together: all of them, each in one group; empty where that is not known.
    """

    tables: tuple[TableSpec, ...]
    sequences: tuple[SequenceSpec, ...] = ()
    dense: tuple[str, ...] = ()
    tasks: tuple[str, ...]
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.groups:
            check_groups(self.groups, self.fields)
        return self

    @property
    def bag_keys(self) -> tuple[str, ...]:
        """The keys of `RankingBatch.sparse`, in order."""
        return tuple(key for table in self.tables for key in table.bags)

    @property
    def sequence_keys(self) -> tuple[str, ...]:
        """The keys of `RankingBatch.sequences`, in order."""
        return tuple(key for table in self.tables for key in table.sequences)

    @property
    def fields(self) -> tuple[str, ...]:
        """The names that groups use: pooled keys, targets of sequences, sequences by their name, dense columns."""
        targets = dict.fromkeys(s.target for s in self.sequences)
        return (*self.bag_keys, *targets, *(s.name for s in self.sequences), *self.dense)


def check_groups(groups: Mapping[str, tuple[str, ...]], fields: Collection[str]) -> None:
    """Hold that the groups are a partition of the fields.

    Raises:
        Problem: at the key ``groups``; it names the group and the field that break it.
    """
    group_of: dict[str, str] = {}
    for group, members in groups.items():
        if not members:
            raise Problem(("groups",), f"{group!r} holds no field")
        for field in members:
            if field not in fields:
                raise Problem(("groups",), f"{group!r}: {unknown('field', field, fields)}")
            if field in group_of:
                twice = f"field {field!r} is in {group_of[field]!r} and again in {group!r}"
                raise Problem(("groups",), f"{twice}; expected exactly one group")
            group_of[field] = group
    if forgotten := [field for field in fields if field not in group_of]:
        message = f"field {forgotten[0]!r} is in no group; expected every field in exactly one ({', '.join(forgotten)})"
        raise Problem(("groups",), message)
