# SPDX-License-Identifier: Apache-2.0
"""Hold the events of a day against the recipe's checks, before anything is made of them.

A day is judged beside the days before it as they were then: late data of an earlier day reopens that day, and no other.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.checks import CheckReport, DataChecks, Finding, examine
from pipelines.graph.step import Context
from pipelines.steps.ingest import ALL, DATASET, DAY, REPORT
from recsys.core.files import read_json, write_bytes, write_json

LOOKS_BACK = 60
"""The most days before it that a day may be compared with."""
JSON, TEXT = "checks.json", "checks.txt"


def run(context: Context) -> None:
    """Write the report of the checks as JSON and as text; where one fails, into the working directory only.

    Raises:
        ChecksFailed: a check failed; names each with its column, what was found and what was expected.
    """
    checks = context.recipe.checks or DataChecks()
    here = context.inputs["ingest"]
    before = {day: events_of(places["ingest"]) for day, places in list(context.before.items())[-checks.days :]}
    partition = str(context.partition)
    report = examine(checks, partition, events_of(here), before, dropped=_dropped(here), daily=partition != ALL)
    write_report(report, context.work)
    report.raise_failed()
    write_report(report, context.out)


def write_report(report: CheckReport, folder: Path) -> None:
    """Write the report for machines and for people."""
    write_json(folder / JSON, report.as_json())
    write_bytes(folder / TEXT, report.table().encode())


def read_findings(directory: Path) -> list[Finding]:
    """What `write_report` wrote of each demand."""
    return [Finding(**finding) for finding in read_json(directory / JSON)["findings"]]


def events_of(directory: Path) -> pa.Table:
    """The canonical events that ingest wrote."""
    path = directory / DAY
    return pq.read_table(path if path.is_file() else directory / DATASET / "interactions.parquet")


def _dropped(directory: Path) -> float:
    """The share of the raw rows of events that ingest left out."""
    path = directory / REPORT
    counts = read_json(path)["counts"] if path.is_file() else read_json(directory / DATASET / "dataset.json")["report"]["tables"][0]
    return 1 - counts["kept"] / counts["read"] if counts["read"] else 0.0
