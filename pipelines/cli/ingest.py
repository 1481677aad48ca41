# SPDX-License-Identifier: Apache-2.0
"""`recsys ingest`: from a user's Parquet or CSV files to a data set, with an account of every row that was not kept."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli._engine import add_engine, check_partitions, engine_of, progress_lines
from recsys.core.errors import ConfigError
from recsys.data.dataset import IngestReport
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest import ingest, ingest_partitioned

_DESCRIPTION = "Check and clean events, items and users; write them as one data set for the `dataset` section of a recipe."


def main(argv: list[str]) -> int:
    """The command. A source or schema that cannot be used is a `RecsysError`."""
    parser = argparse.ArgumentParser(prog="recsys ingest", description=_DESCRIPTION)
    file = "a Parquet, CSV or TSV file, or a folder of Parquet files"
    parser.add_argument("--interactions", type=Path, required=True, metavar="FILE", help=f"the events: {file}")
    parser.add_argument("--items", type=Path, required=True, metavar="FILE", help="the items: likewise")
    parser.add_argument("--users", type=Path, metavar="FILE", help="the users' attributes, where there are any: likewise")
    parser.add_argument("--schema", type=Path, required=True, metavar="FILE", help="which column plays which role (YAML)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where to write the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set in that directory")
    parts = "divide the users into P parts, one of which is in memory at a time; the events must be Parquet"
    parser.add_argument("--partitions", type=int, metavar="P", help=parts)
    add_engine(parser)
    options = parser.parse_args(argv)
    schema, sources = DatasetSchema.load(options.schema), (options.interactions, options.items, options.users)
    console = Console()
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


def print_report(console: Console, report: IngestReport) -> None:
    """The counts of each table, and below them every rule with the rows that it met."""
    totals = Table("table", "read", "kept", "file", box=None, header_style="dim")
    for counts in report.tables:
        totals.add_row(counts.table, f"{counts.read:,}", f"{counts.kept:,}", Text(counts.file))
    console.print(totals)
    treatments = Table("table", "rule", "rows", "were", "such as", box=None, header_style="dim")
    for treatment in report.treatments:
        rule = treatment.rule if treatment.column is None else f"{treatment.rule} ({treatment.column})"
        # As Text, since an id may look like markup.
        cells = (treatment.table, rule, f"{treatment.count:,}", treatment.action, "; ".join(treatment.examples))
        treatments.add_row(*map(Text, cells), style="" if treatment.count else "dim")
    console.print(treatments)
    console.print(f"events from {report.first_event:%Y-%m-%d %H:%M:%S} to {report.last_event:%Y-%m-%d %H:%M:%S} UTC")
