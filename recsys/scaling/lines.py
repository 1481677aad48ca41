# SPDX-License-Identifier: Apache-2.0
"""A file with one line of JSON for each finished cell, which survives an interruption at any byte."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from recsys.core.errors import DataError
from recsys.core.files import canonical_json, write_bytes

Row = dict[str, Any]

logger = logging.getLogger(__name__)


class Lines:
    """Finished cells, one line of JSON each, appended and flushed to disk.

    Args:
        path: the file; it need not exist.
        key: the field that tells cells apart.
    """

    def __init__(self, path: Path, key: str = "key") -> None:
        self.path, self._key = path, key

    def read(self) -> dict[str, Row]:
        """The cells by key; of two with one key the later one. A last line that was cut off is left out, with a warning.

        Raises:
            DataError: another line is not a cell; names it.
        """
        if not self.path.exists():
            return {}
        found: dict[str, Row] = {}
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found[row[self._key]] = row
            except (ValueError, KeyError, TypeError):
                if number < len(lines):
                    raise DataError(f"{self.path}:{number}: expected a cell as JSON with {self._key!r}, got {line[:60]!r}") from None
                logger.warning("%s:%d: the last line was cut off: its cell is trained again", self.path, number)
        return found

    def append(self, row: Row) -> None:
        """Write one line whole; what a torn line before it left is dropped first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        if content and not content.endswith(b"\n"):
            write_bytes(self.path, content[: content.rfind(b"\n") + 1])
        with self.path.open("ab") as stream:
            stream.write(canonical_json(row) + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
