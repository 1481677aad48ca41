# SPDX-License-Identifier: Apache-2.0
"""The feedback loop as a job: decisions and feedback in, labelled impressions out, each exactly once.

A run adds one folder to the output, which takes its name once it is whole: that is its commit. ::

    _schema.yaml                        by which `recsys ingest` reads the impressions
    increment-000001/
        impressions.parquet             `recsys.decisions.impressions.IMPRESSIONS`
        _events.parquet                 the feedback that is in their labels
        _apart.parquet                  feedback that is in no label, and why
        _pending.parquet                feedback that waits; of the newest increment only
        _manifest.json                  which parts and files were read, and up to when

A folder of Parquet files is read without those whose names begin with ``_``, so that the output, as it is, is a source of ingest. Nothing
needs to be remembered of each impression: one of a part that the last run knew was emitted then, if its window had closed by then.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError, DataError
from recsys.core.files import exclusive, new_directory, read_json, sha256_json, write_bytes, write_json
from recsys.core.part_log import part_files
from recsys.core.schema import EVENT_TIME, ITEM, REQUEST_TIME, USER, FeatureSchema
from recsys.core.workspace import stamps
from recsys.data.frames import from_arrow, to_arrow
from recsys.data.ingest.store import write_table
from recsys.decisions.impressions import APART, EVENT_KEYS, EVENTS, IMPRESSIONS, JOINED, LABEL, REQUEST, SCHEMA, read_feedback
from recsys.decisions.join import REASONS, Joined, join_feedback
from recsys.decisions.parts import read_decisions_part

IMPRESSIONS_FILE, EVENTS_FILE, APART_FILE, PENDING_FILE = "impressions.parquet", "_events.parquet", "_apart.parquet", "_pending.parquet"
MANIFEST, SCHEMA_FILE = "_manifest.json", "_schema.yaml"
_BEGUN, _FORMAT, _PREFIX = ".begun.json", 1, "increment-"


class Manifest(Config):
    """The content of an increment's ``_manifest.json``.

    Attributes:
        window: seconds.
        until: feedback was complete up to here.
        parts: of the decision log, by name: whether all its windows have closed, so that it need not be read again.
        files: of feedback, by path: a digest of size and time of change.
        counts: see `FeedbackReport`.
    """

    format: int = _FORMAT
    window: int
    until: datetime
    parts: dict[str, bool]
    files: dict[str, str]
    counts: dict[str, int]


@dataclass(frozen=True)
class FeedbackReport:
    """What a run did.

    Attributes:
        increment: the folder that it added; None where there was nothing to add.
        until: feedback was taken as complete up to here.
        counts: ``impressions``, ``positives`` (labels above 0), ``events`` (in labels), ``pending`` (events that wait), ``repeated``
            (events that had come before), ``incomplete`` (rows of feedback that lack a value), ``lost_parts`` (decisions that were removed
            before their windows closed), and one for each of `recsys.decisions.join.REASONS`.
    """

    increment: Path | None
    until: datetime
    counts: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"increment": self.increment and str(self.increment), "until": self.until.isoformat(), "counts": self.counts}


def join_decisions(decisions: Path, feedback: Sequence[Path], out: Path, *, window: int, until: datetime | None = None) -> FeedbackReport:
    """Emit the impressions whose windows have closed since the last run.

    Killed at any moment and run again it gives the same files: an increment is there or it is not, and a run without ``until`` takes that
    of the one that was killed.

    Args:
        decisions: the folder of a `recsys.decisions.log.DecisionLog`. Its parts have to stay until their windows have closed.
        feedback: files of events, see `recsys.decisions.impressions.read_feedback`; one that an earlier run has read is not read again.
        out: the folder of the increments.
        window: seconds after a request in which feedback counts.
        until: feedback is complete up to here: windows that close later stay open. By default the present.

    Raises:
        ConfigError: ``window`` is not above 0, or not the one of the earlier runs; ``until`` has no offset.
        DataError: another run is at work on ``out``, or a file is damaged.
        SchemaError: a file lacks a column.
    """
    if window < 1:
        raise ConfigError(f"window: expected at least 1 second, got {window}")
    if until is not None and until.tzinfo is None:
        raise ConfigError(f"until: expected a time with an offset from UTC, got {until.isoformat()}")
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out, f"{out}: another run is joining feedback at this moment"):
        _tidy(out)
        if not (out / SCHEMA_FILE).is_file():
            write_bytes(out / SCHEMA_FILE, SCHEMA.dump().encode())
        last = _last(out)
        if last is not None and last.window != window:
            raise ConfigError(
                f"{out}: window: expected {last.window} as in the earlier runs, got {window}; another one needs another folder"
            )
        end = _until(out, until)
        report = _run(decisions, feedback, out, last, window, end if last is None else max(end, last.until.astimezone(UTC)))
        (out / _BEGUN).unlink(missing_ok=True)
        _tidy(out)
        return report


def increments(out: Path) -> list[Path]:
    """The increments of a folder, in their order."""
    return sorted(path for path in out.glob(f"{_PREFIX}*") if path.is_dir())


def _run(decisions: Path, feedback: Sequence[Path], out: Path, last: Manifest | None, window: int, until: datetime) -> FeedbackReport:
    known = {} if last is None else last.parts
    there = {path.name: path for path in part_files(decisions)}
    parts = {name: known.get(name, False) for name in there}
    shown, closed = _shown([path for name, path in there.items() if not parts[name]], known, timedelta(seconds=window), until)
    files = {str(path.resolve()): sha256_json(stamps(path)) for path in feedback}
    read = {} if last is None else last.files
    fresh = [path for path in feedback if read.get(str(path.resolve())) != files[str(path.resolve())]]
    events, incomplete = _events(out, fresh)
    since = None if last is None else last.until.astimezone(UTC)
    joined = join_feedback(shown, events, _Emitted(increments(out)), since=since, until=until, window=timedelta(seconds=window))
    lost = sum(not done for name, done in known.items() if name not in there)
    counts = _counts(joined, incomplete, lost)
    if not (joined.impressions.height or joined.apart.height or fresh or lost or parts.keys() - known.keys()):
        return FeedbackReport(None, until, counts)
    manifest = Manifest(window=window, until=until, parts=parts | closed, files=read | files, counts=counts)
    return FeedbackReport(_write(out, joined, manifest), until, counts)


def _shown(paths: Sequence[Path], known: dict[str, bool], window: timedelta, until: datetime) -> tuple[pl.DataFrame, dict[str, bool]]:
    """Every place of every list of some parts, and of each part whether all its windows have closed."""
    frames, closed = [_NONE_SHOWN], {}
    for path in paths:
        part = from_arrow(read_decisions_part(path, ("request_id", "time", "user_id", "kind", "shown")))
        closed[path.name] = part.filter(pl.col("time") + window > until).is_empty()
        places = part.explode("shown").filter(pl.col("shown").is_not_null())
        shown = pl.col("shown").struct
        frames.append(
            places.select(
                pl.col("user_id").alias(USER),
                shown.field("item_id").alias(ITEM),
                pl.col("time").alias(REQUEST_TIME),
                shown.field("position").cast(pl.Int64),
                shown.field("propensity"),
                pl.col("request_id").alias(REQUEST),
                pl.col("kind").alias("list_kind"),
                pl.lit(path.name not in known).alias("new"),
            )
        )
    return pl.concat(frames), closed


_NONE_SHOWN = pl.DataFrame(
    schema={
        USER: pl.String,
        ITEM: pl.String,
        REQUEST_TIME: pl.Datetime("us", "UTC"),
        "position": pl.Int64,
        "propensity": pl.Float64,
        REQUEST: pl.String,
        "list_kind": pl.String,
        "new": pl.Boolean,
    }
)


def _events(out: Path, files: Sequence[Path]) -> tuple[pl.DataFrame, int]:
    """What waits since the last run and what the files add; and how many of their rows are incomplete."""
    before = increments(out)
    frames = [from_arrow(EVENTS.to_arrow().empty_table())]
    if before:
        frames.append(from_arrow(read_columns(before[-1] / PENDING_FILE, EVENT_KEYS)))
    incomplete = 0
    for path in files:
        frame, left_out = read_feedback(path)
        frames.append(frame)
        incomplete += left_out
    return pl.concat(frames), incomplete


def _counts(joined: Joined, incomplete: int, lost_parts: int) -> dict[str, int]:
    reasons = dict(joined.apart.group_by("reason").len().iter_rows())
    return {
        "impressions": joined.impressions.height,
        "positives": joined.impressions.filter(pl.col(LABEL) > 0).height,
        "events": joined.events.height,
        "pending": joined.pending.height,
        "repeated": joined.repeated,
        "incomplete": incomplete,
        "lost_parts": lost_parts,
        **{reason: int(reasons.get(reason, 0)) for reason in REASONS},
    }


def _write(out: Path, joined: Joined, manifest: Manifest) -> Path:
    """Add an increment."""
    path = out / f"{_PREFIX}{len(increments(out)) + 1:06d}"
    impressions = joined.impressions.rename({REQUEST_TIME: EVENT_TIME, "close": "available_time"})
    tables: tuple[tuple[str, pl.DataFrame, FeatureSchema], ...] = (
        (IMPRESSIONS_FILE, impressions, IMPRESSIONS),
        (EVENTS_FILE, joined.events, JOINED),
        (APART_FILE, joined.apart, APART),
        (PENDING_FILE, joined.pending, EVENTS),
    )
    with new_directory(path) as directory:
        for name, frame, schema in tables:
            write_table(directory / name, to_arrow(frame, schema))
        write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return path


class _Emitted:
    """See `recsys.decisions.join.Past`: what the increments hold."""

    def __init__(self, found: Sequence[Path]) -> None:
        self._found = found

    def impressions(self, requests: pl.Series) -> pl.DataFrame:
        """See `Past.impressions`."""
        frame = self._of(IMPRESSIONS_FILE, requests, (REQUEST, ITEM, EVENT_TIME, "available_time"), IMPRESSIONS)
        return frame.rename({EVENT_TIME: REQUEST_TIME, "available_time": "close"})

    def joined(self, requests: pl.Series) -> pl.DataFrame:
        """See `Past.joined`."""
        return self._of(EVENTS_FILE, requests, EVENT_KEYS, JOINED)

    def apart(self, requests: pl.Series) -> pl.DataFrame:
        """See `Past.apart`."""
        return self._of(APART_FILE, requests, EVENT_KEYS, APART)

    def _of(self, name: str, requests: pl.Series, columns: Sequence[str], schema: FeatureSchema) -> pl.DataFrame:
        none = from_arrow(schema.to_arrow().empty_table()).select(columns)
        wanted = pl.col(REQUEST).is_in(requests.implode())
        return pl.concat([none, *(from_arrow(read_columns(path / name, columns)).filter(wanted) for path in self._found)])


def read_columns(path: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a file of an increment; `DataError` where it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read(list(columns)).select(list(columns))
    except (OSError, ValueError, KeyError) as error:  # Arrow's errors are among them
        raise DataError(f"{path}: cannot be read: {error}") from None


def _last(out: Path) -> Manifest | None:
    found = increments(out)
    if not found:
        return None
    path = found[-1] / MANIFEST
    try:
        manifest = parse(Manifest, read_json(path), source=str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if manifest.format != _FORMAT:
        raise DataError(f"{path}: format: expected {_FORMAT}, got {manifest.format}")
    return manifest


def _until(out: Path, given: datetime | None) -> datetime:
    """The time that was given, or the present; or that of a run which was killed."""
    if given is not None:
        return given.astimezone(UTC)
    try:
        return datetime.fromisoformat(read_json(out / _BEGUN)["until"]).astimezone(UTC)
    except (OSError, ValueError, KeyError, TypeError):
        now = datetime.now(UTC)
        write_json(out / _BEGUN, {"until": now.isoformat()})
        return now


def _tidy(out: Path) -> None:
    """Remove what runs that were killed left, and what waited in earlier runs."""
    for left in out.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for old in increments(out)[:-1]:
        (old / PENDING_FILE).unlink(missing_ok=True)
