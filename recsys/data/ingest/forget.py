# SPDX-License-Identifier: Apache-2.0
"""Taking a user out of a data set that ingest wrote, so that what is left is a data set again."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys.core.errors import DataError
from recsys.core.files import exclusive, new_directory, replace_directory, write_json
from recsys.core.scatter import part_of
from recsys.core.schema import USER, FeatureSchema
from recsys.core.workspace import work_folder
from recsys.data.dataset import Dataset, IngestReport, TableCounts, TableName, Treatment
from recsys.data.dataset_schema import DatasetSchema
from recsys.data.ingest.store import MANIFEST, Manifest, Partitions, part_digest, part_file, parts_fingerprint, read_manifest, write_table

RULE = "forgotten_user"
_WHOLE = "interactions.parquet"


def forget_user(directory: Path, user_id: str) -> dict[str, int]:
    """Take a user's events and attributes out of a data set; how many rows of each table there were.

    The data set is replaced whole, with the fingerprint of what is left; files that do not change are kept as further names of themselves.
    Its report counts the rows as dropped by the rule ``forgotten_user``, without an example, and loses the examples that name the user.

    Args:
        directory: what `recsys.data.ingest.ingest` or `ingest_partitioned` wrote.
        user_id: the user.

    Raises:
        DataError: it is not a data set, is damaged, or holds no other user's event.
    """
    _remove_leftovers(directory)
    manifest, schema = read_manifest(directory)
    changed = {path: rows for path in _files_of(directory, manifest, schema, user_id) if (rows := _rows(directory / path, user_id))}
    report = _without_examples(manifest.report, user_id)
    gone = {"interactions": 0} | ({} if schema.users is None else {"users": 0})
    for path, rows in changed.items():
        gone["users" if path.name == "users.parquet" else "interactions"] += rows
    if not changed and report == manifest.report:
        return gone
    if _kept(report, "interactions") == gone["interactions"]:
        raise DataError(f"{directory}: no event would be left without this user: remove the data set instead")
    whole = directory.with_name(f".{directory.name}.{os.getpid()}.new")
    with new_directory(whole) as new:
        _copy(directory, new, {*changed, Path(MANIFEST)})
        for path in changed:
            _write_without(directory / path, new / path, user_id)
        left = _counted(report, gone)
        write_json(new / MANIFEST, _manifest(new, manifest, schema, left, user_id).model_dump(mode="json"))
    replace_directory(whole, directory)
    return gone


def _remove_leftovers(directory: Path) -> None:
    """Remove what ingest or this function left beside the data set when it was killed: it may hold the user."""
    work = work_folder(directory)
    if work.is_dir():
        with exclusive(work, f"{directory}: another run is making it at this moment"):
            shutil.rmtree(work)
    siblings = directory.parent.iterdir()
    for left in (path for path in siblings if path.name.lstrip(".").startswith(f"{directory.name}.") and path.name.startswith(".")):
        if left.suffix in (".new", ".old", ".tmp"):
            shutil.rmtree(left, ignore_errors=True)


def _files_of(directory: Path, manifest: Manifest, schema: DatasetSchema, user_id: str) -> list[Path]:
    """The files that may hold the user, relative to the data set: of parts, the one to which the user belongs."""
    if manifest.partitions is None:
        events = Path(_WHOLE)
    else:
        events = part_file(directory, _part(user_id, manifest.partitions)).relative_to(directory)
    return [events] if schema.users is None else [events, Path("users.parquet")]


def _rows(path: Path, user_id: str) -> int:
    try:
        users = pq.ParquetFile(path).read([USER]).column(USER)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return int(pc.sum(pc.equal(users, user_id)).as_py() or 0)


def _write_without(source: Path, target: Path, user_id: str) -> None:
    table = pq.ParquetFile(source).read()
    others = ~np.asarray(pc.fill_null(pc.equal(table.column(USER), user_id), False), bool)
    write_table(target, table.filter(pa.array(others)))


def _copy(source: Path, target: Path, without: set[Path]) -> None:
    """All other files, as further names where the file system allows, else as copies."""
    for path in sorted(each for each in source.rglob("*") if each.is_file() and not each.name.startswith(".")):
        relative = path.relative_to(source)
        if relative not in without:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, target / relative)
            except OSError:
                shutil.copy2(path, target / relative)


def _manifest(directory: Path, manifest: Manifest, schema: DatasetSchema, report: IngestReport, user_id: str) -> Manifest:
    """The manifest of what is left in ``directory``. Of events in parts, only the part of the user has another size and digest."""
    partitions, events = manifest.partitions, schema.interactions.features
    users = None if schema.users is None else _read(directory / "users.parquet", schema.users.features)
    interactions = events.to_arrow().empty_table() if partitions else _read(directory / _WHOLE, events)
    items = _read(directory / "items.parquet", schema.items.features)
    dataset = Dataset(manifest.dataset, interactions, items, users, schema, report)
    if partitions is None:
        return manifest.model_copy(update={"fingerprint": dataset.fingerprint(), "report": report})
    part = _part(user_id, partitions)
    mine = _read(part_file(directory, part), events)
    rows, digests = list(partitions.rows), list(partitions.digests)
    rows[part], digests[part] = mine.num_rows, part_digest(mine, schema)
    left = partitions.model_copy(update={"rows": tuple(rows), "digests": tuple(digests)})
    fingerprint = parts_fingerprint(digests, dataset)
    return manifest.model_copy(update={"fingerprint": fingerprint, "report": report, "partitions": left})


def _part(user_id: str, partitions: Partitions) -> int:
    """The part that holds a user's events."""
    return int(part_of(pa.array([user_id]), partitions.count)[0])


def _read(path: Path, columns: FeatureSchema) -> pa.Table:
    return columns.conform(pq.ParquetFile(path).read(), what=str(path))


def _without_examples(report: IngestReport, user_id: str) -> IngestReport:
    """The report without the examples that name the user; an example that may do so goes as well."""
    named = f"{USER}={user_id}"
    treatments = tuple(
        treatment.model_copy(update={"examples": tuple(example for example in treatment.examples if named not in example)})
        for treatment in report.treatments
    )
    return report.model_copy(update={"treatments": treatments})


def _kept(report: IngestReport, table: TableName) -> int:
    return sum(counts.kept for counts in report.tables if counts.table == table)


def _counted(report: IngestReport, gone: dict[str, int]) -> IngestReport:
    """The report with the rows that went as dropped by a rule, so that what was read is still kept or accounted for."""
    tables: Sequence[TableCounts] = [c.model_copy(update={"kept": c.kept - gone.get(c.table, 0)}) for c in report.tables]
    names: tuple[TableName, ...] = ("interactions", "users")
    before = {table: report.count(table, RULE) for table in names}
    others = tuple(treatment for treatment in report.treatments if treatment.rule != RULE)
    forgotten = tuple(
        Treatment(table=table, rule=RULE, action="dropped", count=before[table] + gone.get(table, 0))
        for table in names
        if before[table] + gone.get(table, 0)
    )
    return report.model_copy(update={"tables": tuple(tables), "treatments": (*others, *forgotten)})
