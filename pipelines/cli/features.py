# SPDX-License-Identifier: Apache-2.0
"""`recsys features`: what was served against the same features read offline, and features of a log that does not fit in memory.

``audit RECIPE --served DIRECTORY`` compares; ``join RECIPE --partitions P --out DIRECTORY`` writes every event, or every row of another
spine, with its features.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from feature_store.audit import ALERT, AuditReport, audit
from feature_store.partitions import JoinConfig
from pipelines.cli._engine import add_engine, check_partitions, engine_of, progress_lines
from recsys.core.config import load_recipe, recipe_names
from recsys.core.errors import DataError
from recsys.core.files import write_json


def main(argv: list[str]) -> int:
    """The command; the status of an audit is 1 where a feature is above the alert threshold."""
    parser = argparse.ArgumentParser(prog="recsys features", description="Look after the features of a recipe.")
    actions = parser.add_subparsers(dest="action", required=True)
    _add_audit(actions.add_parser("audit", help="compare what was served with the same features read offline"))
    _add_join(actions.add_parser("join", help="write rows with their features, of a log that does not fit in memory"))
    arguments = parser.parse_args(argv)
    return _audit(arguments) if arguments.action == "audit" else _join(arguments)


def _add_audit(options: argparse.ArgumentParser) -> None:
    options.add_argument("recipe", help=f"whose features were served: one of {', '.join(recipe_names())}, or a YAML file")
    options.add_argument("--served", type=Path, required=True, metavar="DIRECTORY", help="the parts that a served log wrote")
    options.add_argument("--alert", type=float, default=ALERT, help="the share of wrong rows above which a feature fails (%(default)g)")
    options.add_argument("--json", type=Path, metavar="PATH", help="write the report there, too")
    _add_overrides(options)


def _add_join(options: argparse.ArgumentParser) -> None:
    options.add_argument("recipe", help=f"whose features to read, of its dataset: one of {', '.join(recipe_names())}, or a YAML file")
    options.add_argument("--out", type=Path, required=True, metavar="DIRECTORY", help="where to write the rows; it must not exist")
    spine = "a Parquet file or a folder of them, with keys and request_time; by default every event, just before its second"
    options.add_argument("--spine", type=Path, metavar="PATH", help=spine)
    options.add_argument("--services", default="user,item", metavar="NAMES", help="the feature services to read (%(default)s)")
    parts = "divide the entities of each type into P parts, one of which is in memory at a time"
    options.add_argument("--partitions", type=int, required=True, metavar="P", help=parts)
    order = "of the rows: by part of the first service's entity, or as in the spine (%(default)s)"
    options.add_argument("--order", choices=("partition", "spine"), default="partition", help=order)
    add_engine(options)
    _add_overrides(options)


def _add_overrides(options: argparse.ArgumentParser) -> None:
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the recipe")


def _join(arguments: argparse.Namespace) -> int:
    from pipelines.recipe import Recipe
    from pipelines.steps.spine import join_events

    recipe = load_recipe(Recipe, arguments.recipe, arguments.overrides)
    console = Console()
    with progress_lines(console) as progress:
        report = join_events(
            recipe.features,
            recipe.dataset,
            arguments.out,
            spine=arguments.spine,
            services=[name.strip() for name in arguments.services.split(",")],
            config=JoinConfig(partitions=check_partitions(arguments.partitions), order=arguments.order),
            engine=engine_of(arguments),
            progress=progress,
        )
    console.print(Text(f"{arguments.out}: {report.rows:,} rows in {report.parts} parts"), soft_wrap=True)
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from pipelines.recipe import Recipe
    from pipelines.steps.features import feature_tables
    from recsys.data.datasets import load_dataset

    recipe = load_recipe(Recipe, arguments.recipe, arguments.overrides)
    tables = feature_tables(recipe.features, load_dataset(recipe.dataset))
    report = audit(recipe.features, tables, arguments.served, alert=arguments.alert)
    if arguments.json is not None:
        write_json(arguments.json, report.as_json())
    print_report(Console(), report)
    if not report.rows:
        raise DataError(
            f"{arguments.served}: no row is of the features as {recipe.name} defines them; audit with the recipe that was served"
        )
    return 1 if report.alarms else 0


def print_report(console: Console, report: AuditReport) -> None:
    """One line for each feature, those above the threshold in red, and when these were worst."""
    heads = ("service", "feature", "rows", "wrong", "mismatch", "missing", "extra", "status", "sMAPE", "edits", "largest")
    table = Table(*heads, box=None, header_style="dim")
    for feature in report.features:
        counts = (feature.mismatch, feature.missing, feature.extra, feature.status)
        distances = (feature.smape, feature.edit_distance, feature.largest)
        cells = (feature.service, feature.feature, f"{feature.rows:,}", f"{feature.share:.3%}", *(f"{count:,}" for count in counts))
        style = "red" if feature.share > report.alert else ""
        table.add_row(*map(Text, (*cells, *("–" if value is None else f"{value:.4g}" for value in distances))), style=style)
    console.print(table)
    for feature in report.alarms:
        day, share = max(feature.days.items(), key=lambda item: item[1])
        name = f"{feature.service}.{feature.feature}"
        console.print(Text(f"{name}: {feature.share:.3%} of rows are wrong, on {day} {share:.3%}"), soft_wrap=True)
    others = f", {report.other_versions:,} rows of other versions were not compared" if report.other_versions else ""
    console.print(Text(f"{report.rows:,} rows of {report.files:,} files{others}"), soft_wrap=True)
