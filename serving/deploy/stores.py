# SPDX-License-Identifier: Apache-2.0
"""Copies of the embedded online stores for servers on other machines: ``python -m serving.deploy.stores publish|fetch``.

A store is one SQLite file in WAL mode, which processes of one machine share, and no others: on a network file system its readers and its
writer would not see each other's locks. So whoever materialises publishes a copy of each store into a folder that all machines see, whole
under its name or not at all, and every server takes its own copy before it starts. A server sees what was published before that.
"""

import argparse
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from recsys.core.errors import DataError, RecsysError
from recsys.core.files import new_file
from recsys.core.tombstones import FILE as TOMBSTONES
from recsys.registry.location import Location, home


def publish(home_folder: Path, shared: Path) -> list[str]:
    """Write the stores below a home, and who was forgotten, into a shared folder; what is written meanwhile is in the copy or not.

    Args:
        home_folder: of the process that materialises.
        shared: may be a network file system; it is only ever written to whole files under new names, which are then renamed.

    Returns:
        The names of the stores.

    Raises:
        DataError: there is no store, or one cannot be read.
    """
    stores = _stores(Location.under(home_folder).online)
    for store in stores:
        with tempfile.TemporaryDirectory(dir=home_folder) as folder:
            whole = Path(folder) / store.name
            _back_up(store, whole)
            with new_file(shared / store.name) as copy:
                shutil.copyfile(whole, copy)
    if (forgotten := home_folder / TOMBSTONES).is_file():
        with new_file(shared / TOMBSTONES) as copy:
            shutil.copyfile(forgotten, copy)
    return [store.name for store in stores]


def fetch(home_folder: Path, shared: Path) -> list[str]:
    """Copy what was published to below a home, before its server starts; stores that are there are replaced.

    Returns:
        The names of the stores.

    Raises:
        DataError: nothing was published.
    """
    stores = _stores(shared)
    for store in stores:
        target = Location.under(home_folder).online / store.name
        with new_file(target) as copy:
            shutil.copyfile(store, copy)
            for beside in ("-wal", "-shm"):  # of the copy before: SQLite would take them for this one's
                target.with_name(target.name + beside).unlink(missing_ok=True)
    if (forgotten := shared / TOMBSTONES).is_file():
        with new_file(home_folder / TOMBSTONES) as copy:
            shutil.copyfile(forgotten, copy)
    return [store.name for store in stores]


def _stores(folder: Path) -> list[Path]:
    found = sorted(folder.glob("[!.]*.sqlite"))
    if not found:
        raise DataError(f"{folder}: expected online stores, *.sqlite, and there is none: materialise and publish the features first")
    return found


def _back_up(store: Path, target: Path) -> None:
    """One file with all that was committed, whatever of it still stands in the log beside the store."""
    try:
        with (
            closing(sqlite3.connect(f"{store.resolve().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
    except sqlite3.Error as error:
        raise DataError(f"{store}: cannot be copied: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m serving.deploy.stores", description="Copy online stores between machines.")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, option, what in (("publish", "--to", "copy the stores to a shared folder"), ("fetch", "--from", "copy them from there")):
        action = actions.add_parser(name, help=what)
        action.add_argument(option, type=Path, required=True, metavar="FOLDER", dest="shared", help="that all machines see")
        action.add_argument("--home", type=Path, default=home(), help="the folder of registry and online stores (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        names = {"publish": publish, "fetch": fetch}[given.action](given.home, given.shared)
    except RecsysError as error:
        print(f"stores: {error}", file=sys.stderr)
        return 2
    print(f"{given.action}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
