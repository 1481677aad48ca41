# SPDX-License-Identifier: Apache-2.0
"""Who was forgotten, without saying who: keyed hashes of ids, so that data which comes again does not bring anybody back.

The key stands in the same file. It keeps the hashes of one installation from being looked up in a table made elsewhere; whoever has the
file can still try ids one by one, so it is as private as the stores beside it.
"""

import hashlib
import secrets
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.errors import DataError
from recsys.core.files import exclusive, read_json, write_json

FILE = "forgotten.json"
_FORMAT = 1


class Tombstones:
    """The tombstones in a file, as it was when it was read; it need not exist.

    Args:
        path: the file.

    Raises:
        DataError: it is damaged or of another format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key, self._hashes = secrets.token_bytes(32), frozenset[str]()
        self._read()

    @classmethod
    def under(cls, home: Path) -> "Tombstones":
        """Those of the folder of registry and online stores."""
        return cls(home / FILE)

    def __contains__(self, identifier: str) -> bool:
        return self._hash(identifier) in self._hashes

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, identifier: str) -> bool:
        """Write down that somebody is forgotten; whether that is new.

        Raises:
            DataError: another process adds one at this moment.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(self._path.parent, f"{self._path}: another process writes it at this moment"):
            self._read()
            if identifier in self:
                return False
            self._hashes |= {self._hash(identifier)}
            write_json(self._path, {"format": _FORMAT, "key": self._key.hex(), "hashes": sorted(self._hashes)})
            return True

    def of(self, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """bool ``[N]``: which of N ids were forgotten; a null was not."""
        values = ids.cast(pa.string())
        gone = [each for each in pc.unique(values).to_pylist() if each is not None and each in self] if self._hashes else []
        return np.asarray(pc.is_in(values, value_set=pa.array(gone, pa.string())), bool)

    def without(self, table: pa.Table, column: str) -> pa.Table:
        """The table without the rows of whoever was forgotten; a table that lacks the column stays as it is."""
        if not self._hashes or column not in table.column_names:
            return table
        return table.filter(pa.array(~self.of(table.column(column))))

    def _read(self) -> None:
        if not self._path.is_file():
            return
        try:
            content = read_json(self._path)
            version, key, hashes = content["format"], bytes.fromhex(content["key"]), frozenset(content["hashes"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._path}: not a list of tombstones: {error}") from None
        if version != _FORMAT:
            raise DataError(f"{self._path}: format: expected {_FORMAT}, got {version}")
        self._key, self._hashes = key, hashes

    def _hash(self, identifier: str) -> str:
        return hashlib.blake2b(identifier.encode(), key=self._key, digest_size=16).hexdigest()
