# SPDX-License-Identifier: Apache-2.0
"""From steps to Dagster's definitions: one asset for each step, its checks, days, a job, and a daily schedule.

An asset does what `recsys step NAME --only` does, so what is fresh is not made again, whoever made it. Everything runs in the process
of the run.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from pipelines.checks import KINDS, ChecksFailed, Finding
from pipelines.graph import Outcome, Runner, State, Step, status
from pipelines.pipeline import GRAPH
from pipelines.recipe import Recipe
from pipelines.steps.ingest import ALL
from pipelines.steps.validate import read_findings
from recsys.core.errors import RecsysError
from recsys.core.files import read_json

CHECKED = "validate"
JOB, SCHEDULE = "pipeline", "daily"
RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"
"""Tags by which Dagster gives one run a range of partitions."""
_CRON = "30 3 * * *"

Make = Callable[[], Runner]


def definitions(recipe: Recipe, home: Path) -> dg.Definitions:
    """All of a recipe's steps.

    Args:
        recipe: of the run; read again from here by every run.
        home: the folder of results, registry and online stores.

    Raises:
        DataError: the data set has no day.
    """
    days = partitions(recipe)

    def make() -> Runner:
        return Runner(GRAPH, recipe, home)

    assets = [asset(step, make, days if step.partitioned else None) for step in GRAPH.order]
    job = dg.define_asset_job(JOB, selection=dg.AssetSelection.all(), description=f"All steps of {recipe.name}, for one day or a range.")
    return dg.Definitions(assets=assets, jobs=[job], schedules=[_schedule(job, make)], executor=dg.in_process_executor)


def partitions(recipe: Recipe) -> dg.PartitionsDefinition:
    """The days from the first one of the recipe's data set on, in UTC; or the one partition of a data set without days."""
    found = GRAPH.partitions(recipe)
    if tuple(found) == (ALL,):
        return dg.StaticPartitionsDefinition([ALL])
    return dg.DailyPartitionsDefinition(start_date=found[0], timezone="UTC", fmt="%Y-%m-%d")


def asset(step: Step, make: Make, days: dg.PartitionsDefinition | None) -> dg.AssetsDefinition:
    """A step as an asset."""
    checks = [dg.AssetCheckSpec(kind, asset=step.name, description=f"{kind} of a day's events") for kind in KINDS]
    spec = dg.AssetSpec(
        step.name,
        deps=[_dependency(name, days) for name in step.needs],
        description=inspect.getdoc(inspect.getmodule(step.run)),
        group_name="recsys",
    )

    @dg.multi_asset(
        name=step.name,
        specs=[spec],
        check_specs=checks if step.name == CHECKED else None,
        partitions_def=days,
        backfill_policy=None if days is None else dg.BackfillPolicy.single_run(),
    )
    def made(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        runner = make()
        runner.say = context.log.info
        chosen = None if days is None else _present(runner, context.partition_keys)
        try:
            outcomes = [each for each in runner.run([step.name], chosen, only=True) if each.step == step.name]
        except ChecksFailed as error:
            yield from check_results(error.report.findings)
            raise dg.Failure(str(error)) from None
        except RecsysError as error:
            raise dg.Failure(f"{type(error).__name__}: {error}") from error
        if step.name == CHECKED:
            yield from check_results([finding for each in outcomes for finding in read_findings(each.result.directory)])
        yield _result(step, outcomes)

    return made


def check_results(findings: Sequence[Finding]) -> Iterator[dg.AssetCheckResult]:
    """One result for each kind of check; it holds where all findings of the kind do."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    for kind in KINDS:
        failed = [str(finding) for finding in by_kind[kind] if not finding.passed]
        yield dg.AssetCheckResult(
            asset_key=CHECKED,
            check_name=kind,
            passed=not failed,
            severity=dg.AssetCheckSeverity.ERROR,
            description="; ".join(failed) or f"{len(by_kind[kind])} demands hold",
            metadata={"demands": len(by_kind[kind]), "failed": len(failed)},
        )


def _dependency(name: str, days: dg.PartitionsDefinition | None) -> dg.AssetDep:
    """A needed step: the same day's where both have days, all days where only the needed one has."""
    if GRAPH.step(name).partitioned and days is None:
        return dg.AssetDep(name, partition_mapping=dg.AllPartitionMapping())
    return dg.AssetDep(name)


def _present(runner: Runner, keys: Sequence[str]) -> list[str]:
    """The days of a run that the data set has: a range may hold days without files."""
    present = [key for key in keys if key in runner.partitions]
    if not present:
        raise dg.Failure(f"there are no files of {', '.join(keys)}; the data set has {runner.partitions[0]} to {runner.partitions[-1]}")
    return present


def _result(step: Step, outcomes: Sequence[Outcome]) -> dg.MaterializeResult:
    """What Dagster is told of a step: whether it ran, where it stands, and a version, by which it knows equal content."""
    last = outcomes[-1].result
    metadata: dict[str, Any] = {
        "made": sum(outcome.ran for outcome in outcomes),
        "fresh": sum(not outcome.ran for outcome in outcomes),
        "seconds": sum(outcome.result.record.seconds for outcome in outcomes if outcome.ran),
        "key": last.record.key,
        "content": last.record.content,
        "directory": dg.MetadataValue.path(str(last.directory)),
        **_figures(step, last.directory),
    }
    version = dg.DataVersion(last.record.content) if len(outcomes) == 1 else None
    return dg.MaterializeResult(asset_key=step.name, metadata=metadata, data_version=version)


def _figures(step: Step, directory: Path) -> Mapping[str, Any]:
    """What of a result is worth a line in the UI."""
    if step.name == "promote":
        release = read_json(directory / "release.json")
        return {"version": release["version"], "promoted": release["promoted"]}
    if step.name == "evaluate":
        metrics = read_json(directory / "results.json")["metrics"]
        return {"ranking AUC": metrics["ranking"]["ranker"]["auc"], "list NDCG@10": metrics["list"]["final"]["ndcg@10"]}
    return {}


def _schedule(job: Any, make: Make) -> dg.ScheduleDefinition:
    @dg.schedule(job=job, name=SCHEDULE, cron_schedule=_CRON, execution_timezone="UTC")
    def daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        """One run from the first day that is not done, late data included, to yesterday."""
        runner = make()
        yesterday = f"{context.scheduled_execution_time.astimezone(UTC) - timedelta(days=1):%Y-%m-%d}"
        return request(runner, yesterday)

    return daily


def request(runner: Runner, last: str) -> dg.RunRequest | dg.SkipReason:
    """The run that brings everything up to date with the days up to ``last``; a reason where nothing is to do."""
    stale = [each for each in status(runner, [step.name for step in runner.graph.steps]) if each.state is not State.FRESH]
    if not stale:
        return dg.SkipReason("every step is fresh")
    if runner.partitions == (ALL,):
        return dg.RunRequest(partition_key=ALL)
    present = [day for day in runner.partitions if day <= last]
    if not present:
        return dg.SkipReason(f"the data set has no day up to {last}")
    undone = [each.partition for each in stale if each.partition is not None and each.partition <= last]
    tags = {RANGE_START: min(undone, default=present[-1]), RANGE_END: present[-1]}
    return dg.RunRequest(tags=tags)
