# SPDX-License-Identifier: Apache-2.0
"""Arrow tables as the files of a bundle."""

from pathlib import Path

import pyarrow as pa


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow IPC file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_table(path: Path, *, mmap: bool = False) -> pa.Table:
    """Read an Arrow IPC file, or map it."""
    with pa.memory_map(str(path)) if mmap else pa.OSFile(str(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()
