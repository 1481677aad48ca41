# SPDX-License-Identifier: Apache-2.0
"""`recsys gc`: remove the bundles, online stores and caches that nothing refers to."""

import argparse
from pathlib import Path

from recsys.registry import Location, Registry, home
from recsys.registry.collect import collect


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="recsys gc", description="Remove what nothing refers to. The promotion log is kept.")
    parser.add_argument("--home", type=Path, default=home(), help="the folder of registry and online stores (RECSYS_HOME)")
    parser.add_argument("--keep", type=int, required=True, metavar="N", help="how many of the last versions of each model stay in any case")
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and change nothing")
    arguments = parser.parse_args(argv)
    registry = Registry(Location.under(arguments.home))
    count = total = 0
    for garbage in collect(registry, arguments.keep, dry_run=arguments.dry_run):
        print(f"{garbage.kind:<12}  {garbage.name}  {garbage.bytes:,} bytes")
        count, total = count + 1, total + garbage.bytes
    print(f"{'would remove' if arguments.dry_run else 'removed'} {count} things, {total:,} bytes")
    return 0
