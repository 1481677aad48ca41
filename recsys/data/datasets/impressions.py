# SPDX-License-Identifier: Apache-2.0
"""Labelled rows for rankers, built directly: for data sets that have no time of every event and so have no canonical form.

A canonical `Dataset` needs the time of each interaction. MovieLens-1M as it can be had holds times for a tenth of its ratings and only
the order of the others, and Frappe holds none, so these are read as finished impressions, with their split, instead. The files are read
from the folder that the environment variable RECSYS_DATA names; nothing is fetched.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys.core.errors import DataError
from recsys.core.files import sha256_file
from recsys.data.encoding.config import EncoderConfig

FOLDER = "RECSYS_DATA"
LABEL = "label"


@dataclass(frozen=True)
class Impressions:
    """Rows to train and to measure rankers on.

    Attributes:
        name: of the data set.
        parts: ``train``, ``valid`` and ``test``: columns of features, ``user_id`` (string) among them, and ``label`` (0 or 1).
        encoder: what the features become, and which of them belong together.
    """

    name: str
    parts: Mapping[str, pa.Table]
    encoder: EncoderConfig


@dataclass(frozen=True)
class ImpressionSource:
    """Where impressions come from.

    Attributes:
        fingerprint: a hexadecimal SHA-256 of the files, found without building the rows.
        load: builds the rows.
    """

    fingerprint: Callable[[], str]
    load: Callable[[], Impressions]


def data_folder(dataset: str) -> Path:
    """``$RECSYS_DATA/<dataset>``.

    Raises:
        DataError: the variable is not set, or the folder is not there.
    """
    root = os.environ.get(FOLDER)
    if not root:
        raise DataError(f"{dataset}: set the environment variable {FOLDER} to the folder that holds {dataset}/*.parquet; it is not set")
    folder = Path(root) / dataset
    if not folder.is_dir():
        raise DataError(f"{dataset}: {FOLDER} is {root!r}, which holds no folder {dataset!r}")
    return folder


def files_fingerprint(dataset: str, names: tuple[str, ...]) -> str:
    """A hexadecimal SHA-256 over the files of a data set.

    Raises:
        DataError: the folder or a file is not there.
    """
    folder = data_folder(dataset)
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{dataset}: {folder} lacks {absent[0]}")
    return hashlib.sha256("".join(sha256_file(folder / name) for name in names).encode()).hexdigest()


def earlier_events(user: np.ndarray, second: np.ndarray, position: np.ndarray) -> np.ndarray:
    """How many events of its user happened for certain in an earlier second than each row.

    Positions follow time. So when a row of the same user with an earlier second has position p, all events up to p are earlier, whether
    or not their own times are known; events after the last such p are left out, because they may share the row's second.

    Args:
        user: int ``[N]``, at least 0.
        second: int ``[N]``.
        position: int ``[N]``, the place of the row among all events of its user, from 0; -1 where unknown.

    Returns:
        int64 ``[N]``: events 0 to n - 1 of the user are earlier.
    """
    order = np.lexsort((second, user))
    user, second, known = (values[order].astype(np.int64) for values in (user, second, position + 1))
    first = np.r_[True, (user[1:] != user[:-1]) | (second[1:] != second[:-1])]
    starts = np.flatnonzero(first)
    # Users ascend, so that a running maximum of user · size + count begins anew with each of them.
    size = int(known.max(initial=0)) + 1
    running = np.maximum.accumulate(user[starts] * size + np.maximum.reduceat(known, starts))
    base = user[starts] * size
    before = np.maximum(np.r_[0, running[:-1]], base) - base
    counts = np.empty(len(order), dtype=np.int64)
    counts[order] = before[np.cumsum(first) - 1]
    return counts


def last_events(first: np.ndarray, count: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the last ``length`` of each row's earlier events stand in a table of all events, sorted by user and position.

    Args:
        first: int ``[N]``, where the events of the row's user begin.
        count: int ``[N]``, how many of them are earlier.
        length: how many to keep.

    Returns:
        int64 indices of the events, oldest first, one row after another; int64 offsets ``[N + 1]``.
    """
    lengths = np.minimum(count, length)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    picks = np.repeat(first + count - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
    return picks, offsets
