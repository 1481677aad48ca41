# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks [NAME ...] [--quick]``: run some benchmarks, or all."""

import argparse
import importlib
import sys

from rich.console import Console
from rich.table import Table

from benchmarks.frame import Result
from recsys.core.errors import unknown

NAMES = (
    "catalogue_decoding",
    "catalogue_shards",
    "distributed",
    "feature_store",
    "kernels",
    "larger_than_memory",
    "loader",
    "ranking_depth",
    "ranking_growth",
    "ranking_mfu",
    "ranking_quality",
    "ranking_training",
    "retrieval_quality",
    "serving",
    "serving_soak",
    "sparse_moe",
    "token_efficiency",
)


def show(result: Result, console: Console) -> None:
    """Print the table, the checks, and last the JSON line."""
    if result.rows:
        table = Table(*result.rows[0], title=result.benchmark, title_justify="left")
        for row in result.rows:
            table.add_row(*(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    for check in result.checks:
        bounds = " and ".join(f"{sign} {b:g}" for sign, b in ((">=", check.at_least), ("<=", check.at_most)) if b is not None)
        console.print(
            f"{'[green]holds ' if check.holds else '[red]missed'}[/] {check.name}: {check.value:g} {bounds}  [dim]{check.note}[/]"
        )
    print(result.json_line(), flush=True)


def main(argv: list[str]) -> int:
    """The command; the status is 0 whenever everything could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="within 5 minutes on two cores")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in NAMES:
            parser.error(unknown("benchmark", name, NAMES))
    console = Console(stderr=False, width=None if sys.stdout.isatty() else 140)
    for name in arguments.names or NAMES:
        show(importlib.import_module(f"benchmarks.{name}").run(quick=arguments.quick), console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
