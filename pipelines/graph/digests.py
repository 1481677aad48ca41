# SPDX-License-Identifier: Apache-2.0
"""Hashes of files that lie outside, remembered by size, time and place, so that large data are read once and not by every command.

``$RECSYS_CACHE/digests.json`` (by default below ``~/.cache/recsys``) holds them; to delete it costs time only.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from recsys.core.files import read_json, sha256_file, write_json

_SETTLED = 2.0
"""Seconds: a file that was changed this shortly ago may change again within the same tick of its clock, and is not remembered."""


def digests(files: Iterable[Path]) -> dict[Path, str]:
    """The hexadecimal SHA-256 of every file's content."""
    path = _cache() / "digests.json"
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        known = read_json(path)
    found, new = {}, {}
    for file in files:
        about = file.stat()
        name = f"{file.resolve()} {about.st_size} {about.st_mtime_ns} {about.st_ino}"
        digest = known.get(name) or sha256_file(file)
        found[file] = digest
        if name not in known and time.time() - about.st_mtime > _SETTLED:
            new[name] = digest
    if new:
        with suppress(OSError):
            write_json(path, {name: digest for name, digest in known.items() if _place(name).exists()} | new)
    return found


def _place(name: str) -> Path:
    """The file of an entry: what stands before size, time and inode."""
    return Path(name.rsplit(" ", 3)[0])


def _cache() -> Path:
    return Path(os.environ.get("RECSYS_CACHE") or Path.home() / ".cache" / "recsys")
