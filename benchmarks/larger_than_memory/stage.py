# SPDX-License-Identifier: Apache-2.0
"""One stage in a process of its own: ``python -m benchmarks.larger_than_memory.stage STAGE FOLDER SIZE``; the last line is what it took.

Libraries are imported before the clock starts, those of a stage alone.
"""

import json
import resource
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from benchmarks.larger_than_memory import data
from benchmarks.larger_than_memory.data import LIMIT_GIB, Size
from recsys.core.workspace import work_folder

Work = Callable[[], dict[str, Any]]


def generate(folder: Path, size: Size) -> Work:
    """The raw log."""

    def work() -> dict[str, Any]:
        data.generate(folder / "generate", size)
        return {"rows": size.rows}

    return work


def ingest(folder: Path, size: Size) -> Work:
    """From raw files to canonical events in parts."""
    from recsys.data.dataset_schema import DatasetSchema
    from recsys.data.ingest import ingest_partitioned

    raw = folder / "generate"
    schema = DatasetSchema.model_validate(data.SCHEMA)

    def work() -> dict[str, Any]:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        done = ingest_partitioned(
            raw / "events", raw / "items.parquet", None, schema, folder / "ingest", partitions=size.partitions, now=now, progress=_tell
        )
        counts = {rule: done.report.count("interactions", rule) for rule in ("null_user", "unknown_item", "exact_duplicate")}
        return {"rows": size.rows, "kept": done.report.tables[0].kept, "counts": counts}

    return work


def features(folder: Path, size: Size) -> Work:
    """Every event with the features of its user and item as of just before it."""
    from feature_store.definitions import FeatureRepo
    from feature_store.partitions import JoinConfig
    from pipelines.steps.spine import join_events
    from recsys.data.datasets import Ingested

    repo = FeatureRepo.model_validate(data.FEATURES)

    def work() -> dict[str, Any]:
        dataset = Ingested.Config(path=folder / "ingest")
        config = JoinConfig(partitions=size.partitions)
        return {"rows": join_events(repo, dataset, folder / "features", services=("user", "item"), config=config, progress=_tell).rows}

    return work


def loader(folder: Path, size: Size) -> Work:
    """One shuffled pass of the training loader, with an encoder that was fitted on the first file."""
    import pyarrow.parquet as pq

    from recsys.core.config import validate
    from recsys.core.status import status_column
    from recsys.data.encode import Encoder
    from recsys.data.encoding.config import EncoderConfig
    from recsys.data.loader import ParquetLoader

    def work() -> dict[str, Any]:
        first = pq.ParquetFile(folder / "features" / "part=0000" / "rows.parquet").read_row_group(0)
        encoder = Encoder.fit(validate(EncoderConfig, data.ENCODER), first)
        statuses = [status_column(name) for name in encoder.feature_columns if status_column(name) in first.column_names]
        columns = [*encoder.feature_columns, *statuses, *encoder.label_columns]
        batches = ParquetLoader(folder / "features", encoder.transform, batch_size=4096, columns=columns)
        rows = 0
        for count, batch in enumerate(batches, start=1):
            rows += len(batch.dense)
            if count % 1000 == 0:
                _tell("batches", count, len(batches))
        (folder / "loader").mkdir()
        return {"rows": rows}

    return work


def _tell(what: str, done: int, total: int) -> None:
    if done == total or done % max(total // 10, 1) == 0:
        print(f"{what}: {done} of {total}, {_peak() / 2**30:.2f} GiB at most", file=sys.stderr, flush=True)


def _peak() -> int:
    """Bytes: the highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024


def main(argv: list[str]) -> None:
    """Run one stage and print what it took."""
    stage, folder, size = argv[0], Path(argv[1]), Size(**json.loads(argv[2]))
    limit = int(LIMIT_GIB * 2**30)
    if stage != "generate":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    work = {"generate": generate, "ingest": ingest, "features": features, "loader": loader}[stage](folder, size)
    begun = work_folder(folder / stage).exists()  # what it did then is not in the seconds
    start, cpu_start = perf_counter(), process_time()
    found = work()
    seconds, cpu = perf_counter() - start, process_time() - cpu_start
    disk = sum(path.stat().st_size for path in (folder / stage).rglob("*") if path.is_file())
    print(
        json.dumps(
            {
                **found,
                "begun_before": begun,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "peak_bytes": _peak(),
                "disk_bytes": disk,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
