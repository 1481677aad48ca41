# SPDX-License-Identifier: Apache-2.0
"""A folder for a long job that may be killed and run again: it holds what is done so far, and becomes the result at the end."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys.core.files import canonical_json, exclusive, read_json, replace_directory, write_json
from recsys.core.scatter import parquet_files

PLAN, RESULT = "plan.json", "result"


def stamps(source: Path) -> list[list[Any]]:
    """Name, bytes and time of change (nanoseconds) of each file of a source: what tells that a source is another one now.

    Raises:
        DataError: there is no file, or no Parquet file in a folder.
    """
    found = []
    for file in [str(source)] if source.is_file() else parquet_files(source):
        stat = Path(file).stat()
        found.append([file, stat.st_size, stat.st_mtime_ns])
    return found


def work_folder(out: Path) -> Path:
    """Where the job that makes ``out`` keeps what is done so far."""
    return out.with_name(f".{out.name}.work")


@contextmanager
def workspace(out: Path, plan: Any) -> Iterator[Path]:
    """The folder of the job that makes the folder ``out``: ``.<name>.work`` beside it, with ``plan.json``.

    What an earlier run with the same plan has left is there; what one with another plan has left is removed. Where the block ends without
    an error, its folder ``result`` becomes ``out``, in place of what is there, and the rest is removed; otherwise all of it stays for the
    next run.

    Args:
        out: what is to be made.
        plan: a plain JSON value with everything that decides the result.

    Raises:
        DataError: another run is making ``out`` at this moment.
    """
    work = work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work, f"{out}: another run is making it at this moment"):
        if not _same(work / PLAN, plan):
            for left in work.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in list(work.rglob(".*.tmp")):
            left.unlink()
        write_json(work / PLAN, plan)
        yield work
        replace_directory(work / RESULT, out)
        shutil.rmtree(work)


def _same(path: Path, plan: Any) -> bool:
    try:
        return canonical_json(read_json(path)) == canonical_json(plan)
    except (OSError, ValueError):
        return False
