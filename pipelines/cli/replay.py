# SPDX-License-Identifier: Apache-2.0
"""`recsys replay`: recorded decisions computed again, by the bundle that made them or by another, and how far the two are apart."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.cli._registry import open_registry, parser
from recsys.bundle.bundle import Bundle
from recsys.core.errors import DataError, RegistryError
from recsys.core.files import write_json
from recsys.core.part_log import part_files
from recsys.decisions.decision import Decision
from recsys.decisions.parts import decisions_of, read_decisions, read_decisions_part
from recsys.decisions.replay import OVERLAP_AT, ReplayReport, replay
from recsys.ranking.mixers import fold_mixing
from recsys.registry import Registry

TOLERANCE = 1e-5


def main(argv: list[str]) -> int:
    """The command; the status is 1 where a number differs by more than the tolerance."""
    arguments = _options().parse_args(argv)
    registry = open_registry(arguments.home)
    made_by = _bundles(arguments.decisions)
    reports = []
    if arguments.model is not None:
        bundle, _ = registry.load(arguments.model)
        reports.append(_replay(bundle, read_decisions(arguments.decisions)))
    else:
        for sha256, (model, version) in made_by.items():
            bundle = _bundle(registry, sha256, model, version)
            reports.append(_replay(bundle, decisions_of(arguments.decisions, sha256)))
    print_reports(Console(), reports)
    if arguments.json is not None:
        write_json(arguments.json, {"tolerance": arguments.tolerance, "reports": [report.as_json() for report in reports]})
    if not any(report.decisions for report in reports):
        raise DataError(f"{arguments.decisions}: no decision could be computed again; the log keeps the evidence of a share of them")
    return int(any(report.largest_difference > arguments.tolerance for report in reports))


def _options() -> argparse.ArgumentParser:
    options = parser("replay", "Compute recorded decisions again, and compare.")
    options.add_argument("--decisions", type=Path, required=True, metavar="DIRECTORY", help="the parts that a decision log wrote")
    options.add_argument(
        "--model", metavar="URI", help="another bundle, as models:/recsys@champion; by default the one that made each decision"
    )
    tolerance = "the greatest difference of a score or probability that passes (%(default)g); 0 asks for equal bits"
    options.add_argument("--tolerance", type=float, default=TOLERANCE, help=tolerance)
    options.add_argument("--json", type=Path, metavar="PATH", help="write the reports there, too")
    return options


def _replay(bundle: Bundle, decisions: Iterator[Decision]) -> ReplayReport:
    fold_mixing(bundle.ranker)  # as the server does
    return replay(bundle, decisions)


def _bundles(folder: Path) -> Mapping[str, tuple[str, int | None]]:
    """The bundles that made the decisions of a log, by SHA-256: model, and version where it is known."""
    found: dict[str, tuple[str, int | None]] = {}
    for path in part_files(folder):
        part = read_decisions_part(path, ("bundle", "model", "version"))
        for row in part.group_by(["bundle", "model", "version"]).aggregate([]).to_pylist():
            found[row["bundle"]] = (row["model"], row["version"])
    if not found:
        raise DataError(f"{folder}: expected the parts of a decision log with decisions, found none")
    return dict(sorted(found.items()))


def _bundle(registry: Registry, sha256: str, model: str, version: int | None) -> Bundle:
    """The registered bundle of this content."""
    if version is None:
        version = next((event.to_version for event in registry.log.events(model) if event.sha256 == sha256), None)
    if version is None:
        raise RegistryError(f"{model}: the promotion log does not know the bundle {sha256}; name another one with --model")
    bundle, _ = registry.load(f"models:/{model}/{version}")
    if bundle.manifest.sha256 != sha256:
        raise RegistryError(f"{model}: version {version} is the bundle {bundle.manifest.sha256}, but the decisions say {sha256}")
    return bundle


def print_reports(console: Console, reports: list[ReplayReport]) -> None:
    """One line for each bundle, and why decisions were skipped."""
    heads = ("bundle", "decisions", "its own", "rows", "equal bits", "reordered", "log p", "p", "score", f"overlap@{OVERLAP_AT}", "drift")
    table = Table(*heads, box=None, header_style="dim")
    for report in reports:
        counts = (report.decisions, report.own, report.rows, report.exact, report.reordered)
        largest = (report.largest["log_probability"], report.largest["probability"], report.largest["score"])
        rest = (report.overlap, report.score_drift)
        cells = (*(f"{count:,}" for count in counts), *("–" if value is None else f"{value:.3g}" for value in (*largest, *rest)))
        table.add_row(report.bundle[:12], *cells)
    console.print(table)
    for report in reports:
        skipped = ", ".join(f"{reason} {count:,}" for reason, count in report.skipped.items())
        if skipped:
            console.print(Text(f"{report.bundle[:12]}: not computed again: {skipped}"), soft_wrap=True)
        if report.unknown_items:
            console.print(Text(f"{report.bundle[:12]}: {report.unknown_items:,} candidates are not in its catalogue"), soft_wrap=True)
        if report.worst is not None:
            console.print(Text(f"{report.bundle[:12]}: furthest apart: request {report.worst}"), soft_wrap=True)
