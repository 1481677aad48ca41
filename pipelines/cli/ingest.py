# SPDX-License-Identifier: Apache-2.0
"""`recsys ingest`: from a user's Parquet or CSV files to a data set, with an account of every row that was not kept."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli._engine import add_engine, check_partitions, engine_of, progress_lines
from recsys.core.errors import ConfigError
from recsys.data.dataset import IngestReport, TableCounts, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import ingest, ingest_partitioned
from recsys.data.ingest.delta import AppendReport, ingest_delta

_DESCRIPTION = "Check and clean events, items and users; write them as one data set, or append events to a log, for a recipe's `dataset`."


def main(argv: list[str]) -> int:
    """The command. A source or schema that cannot be used is a `RecsysError`."""
    parser = argparse.ArgumentParser(prog="recsys ingest", description=_DESCRIPTION)
    file = "a Parquet, CSV or TSV file, or a folder of Parquet files"
    parser.add_argument("--interactions", type=Path, required=True, metavar="FILE", help=f"the events: {file}")
    parser.add_argument("--items", type=Path, metavar="FILE", help="the items: likewise; needed except with --delta")
    parser.add_argument("--users", type=Path, metavar="FILE", help="the users' attributes, where there are any: likewise")
    parser.add_argument("--schema", type=Path, required=True, metavar="FILE", help="which column plays which role (YAML)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIRECTORY", help="where to write the data set, or the table to append to"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in that directory")
    parts = "divide the users into P parts, one of which is in memory at a time; the events must be Parquet"
    parser.add_argument("--partitions", type=int, metavar="P", help=parts)
    add_engine(parser)
    _add_delta(parser)
    options = parser.parse_args(argv)
    schema, sources = DatasetSchema.load(options.schema), (options.interactions, options.items, options.users)
    console = Console()
    if options.delta:
        return _append(options, schema, console)
    _check_no_delta(options)
    if options.partitions is None:
        if options.engine != "local" or options.workers != 1:
            raise ConfigError("--engine and --workers are of work in parts: expected --partitions beside them")
        dataset = ingest(*sources, schema, options.out, overwrite=options.overwrite)
        report, fingerprint = dataset.report, dataset.fingerprint()
    else:
        with progress_lines(console) as progress:
            manifest = ingest_partitioned(
                *sources,
                schema,
                options.out,
                partitions=check_partitions(options.partitions),
                engine=engine_of(options),
                overwrite=options.overwrite,
                progress=progress,
            )
        report, fingerprint = manifest.report, manifest.fingerprint
    print_report(console, report)
    console.print(Text(f"{options.out}: {fingerprint}"), soft_wrap=True)
    console.print(Text(f"in a recipe: dataset: {{name: ingested, path: {options.out}}}"), soft_wrap=True)
    return 0


def _add_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--delta", action="store_true", help="append the events to a log that is a Delta table, made where it is not there")
    parser.add_argument("--by-day", action="store_true", help="make a new Delta table with a folder for each day of the event time")
    transaction = "of the append; with the same or a lower number nothing is added again (by default the content of the files decides)"
    parser.add_argument("--transaction", metavar="NAME:NUMBER", help=transaction)


def _check_no_delta(options: argparse.Namespace) -> None:
    if options.items is None:
        raise ConfigError("--items is needed, except with --delta")
    if options.by_day or options.transaction is not None:
        raise ConfigError("--by-day and --transaction are of a Delta table: expected --delta beside them")


def _append(options: argparse.Namespace, schema: DatasetSchema, console: Console) -> int:
    if options.items is not None or options.users is not None:
        raise ConfigError("--items and --users are read beside the log, by the recipe: expected neither with --delta")
    if options.partitions is not None or options.engine != "local" or options.workers != 1 or options.overwrite:
        raise ConfigError("--delta appends in this process: expected none of --partitions, --engine, --workers and --overwrite")
    transaction = None if options.transaction is None else _transaction(options.transaction)
    done = ingest_delta(options.interactions, schema, options.out, transaction=transaction, by_day=options.by_day)
    _print_tables(console, (done.counts,), done.treatments)
    console.print(Text(_said(done)), soft_wrap=True)
    recipe = f"{{name: delta, path: {options.out}, version: {done.log.version}, items: ..., roles: {options.schema}}}"
    console.print(Text(f"in a recipe: dataset: {recipe}"), soft_wrap=True)
    return 0


def _said(done: AppendReport) -> str:
    return f"{done.log}: {done.added:,} events added" if done.added else f"{done.log}: nothing added, for this transaction is there already"


def _transaction(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition(":")
    if not name or not number.isdecimal():
        raise ConfigError(f"--transaction: expected NAME:NUMBER, such as clicks:20240301, got {text!r}")
    return name, int(number)


def print_report(console: Console, report: IngestReport) -> None:
    """The counts of each table, and below them every rule with the rows that it met."""
    _print_tables(console, report.tables, report.treatments)
    console.print(f"events from {report.first_event:%Y-%m-%d %H:%M:%S} to {report.last_event:%Y-%m-%d %H:%M:%S} UTC")


def _print_tables(console: Console, tables: Iterable[TableCounts], met: Iterable[Treatment]) -> None:
    totals = Table("table", "read", "kept", "file", box=None, header_style="dim")
    for counts in tables:
        totals.add_row(counts.table, f"{counts.read:,}", f"{counts.kept:,}", Text(counts.file))
    console.print(totals)
    treatments = Table("table", "rule", "rows", "were", "such as", box=None, header_style="dim")
    for treatment in met:
        rule = treatment.rule if treatment.column is None else f"{treatment.rule} ({treatment.column})"
        # As Text, since an id may look like markup.
        cells = (treatment.table, rule, f"{treatment.count:,}", treatment.action, "; ".join(treatment.examples))
        treatments.add_row(*map(Text, cells), style="" if treatment.count else "dim")
    console.print(treatments)
