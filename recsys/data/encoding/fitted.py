# SPDX-License-Identifier: Apache-2.0
"""What an encoder learns from the training table: vocabularies, bucket edges, means and deviations. Plain values, saved and hashed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.config import parse
from recsys.core.errors import BundleError, ConfigError
from recsys.core.files import canonical_json, read_json, write_bytes, write_json
from recsys.data.encoding.coders import quantile_edges, vocabulary
from recsys.data.encoding.columns import STRING, Columns, Scalars
from recsys.data.encoding.config import Bag, Bucket, Categorical, Dense, EncoderConfig, Sequence, item_table, pooled_table

FORMAT = 1
JSON_FILE, ARROW_FILE = "encoder.json", "vocabularies.arrow"


@dataclass(frozen=True)
class Fitted:
    """The learned part of an encoder.

    Attributes:
        vocabularies: for each table of strings, its values, large_string: value i has row i + 2.
        edges: for each bucket feature, the inner edges of its buckets, float64, ascending.
        scales: for each standardised dense feature, the mean and the standard deviation of the transformed values.
    """

    vocabularies: dict[str, pa.Array]
    edges: dict[str, np.ndarray]
    scales: dict[str, tuple[float, float]]

    def numbers(self) -> dict[str, Any]:
        """The numeric part as plain values."""
        return {"edges": {k: v.tolist() for k, v in self.edges.items()}, "scales": {k: list(v) for k, v in self.scales.items()}}


def fit(config: EncoderConfig, columns: Columns) -> Fitted:
    """Learn from a training table."""
    edges, scales = {}, {}
    for feature in config.features:
        if isinstance(feature, Bucket):
            edges[feature.feature] = quantile_edges(_present_numbers(columns.numbers(feature.feature)), feature.buckets)
        elif isinstance(feature, Dense) and feature.standardize:
            scales[feature.feature] = _mean_and_deviation(transform_dense(feature, _present_numbers(columns.numbers(feature.feature))))
    return Fitted(_fit_vocabularies(config, columns), edges, scales)


def transform_dense(feature: Dense, numbers: np.ndarray) -> np.ndarray:
    """Apply the transform of a dense feature, before standardisation."""
    return np.sign(numbers) * np.log1p(np.abs(numbers)) if feature.transform == "log1p" else numbers


def fingerprint(config: EncoderConfig, fitted: Fitted) -> str:
    """Hexadecimal SHA-256 of what decides an encoding: the configuration without its groups, and everything learned.

    It does not depend on library versions or file formats.
    """
    digest = hashlib.sha256(canonical_json({"config": config.model_dump(mode="json", exclude={"groups"}), **fitted.numbers()}))
    for table in sorted(fitted.vocabularies):
        values = fitted.vocabularies[table]
        digest.update(canonical_json([table, len(values)]))
        digest.update(pc.binary_length(values).to_numpy().astype("<i8").tobytes())
        digest.update(_text(values))
    return digest.hexdigest()


def save(directory: Path, config: EncoderConfig, fitted: Fitted) -> None:
    """Write ``encoder.json`` and ``vocabularies.arrow`` into ``directory``, which is made where it does not exist."""
    tables = sorted(fitted.vocabularies)
    values = [fitted.vocabularies[table] for table in tables]
    offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int64())
    elements = pa.concat_arrays(values) if values else pa.array([], STRING)
    rows = pa.table({"table": pa.array(tables, pa.string()), "values": pa.LargeListArray.from_arrays(offsets, elements)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    write_bytes(directory / ARROW_FILE, sink.getvalue().to_pybytes())
    content = {"format": FORMAT, "fingerprint": fingerprint(config, fitted), "config": config.model_dump(mode="json"), **fitted.numbers()}
    write_json(directory / JSON_FILE, content)


def load(directory: Path, *, mmap: bool = False) -> tuple[EncoderConfig, Fitted]:
    """Read what `save` wrote, or map its vocabularies.

    Raises:
        BundleError: a file is absent, cannot be read, or is not the one that was written (the fingerprint differs).
    """
    try:
        content = read_json(directory / JSON_FILE)
        if content["format"] != FORMAT:
            raise BundleError(f"{directory / JSON_FILE}: format {content['format']!r}, expected {FORMAT}")
        config = parse(EncoderConfig, content["config"], source=str(directory / JSON_FILE))
        fitted = Fitted(
            _load_vocabularies(directory / ARROW_FILE, mmap),
            {name: np.array(edges, dtype=np.float64) for name, edges in content["edges"].items()},
            {name: (float(mean), float(deviation)) for name, (mean, deviation) in content["scales"].items()},
        )
        expected = content["fingerprint"]
    except (OSError, json.JSONDecodeError, pa.ArrowInvalid, KeyError, TypeError, ValueError, ConfigError) as error:
        raise BundleError(f"{directory}: not a saved encoder: {error!r}") from error
    found = fingerprint(config, fitted)
    if found != expected:
        raise BundleError(f"{directory}: the content has the fingerprint {found}, but {JSON_FILE} says {expected}")
    return config, fitted


def _load_vocabularies(path: Path, mmap: bool) -> dict[str, pa.Array]:
    with pa.ipc.open_file(pa.memory_map(str(path)) if mmap else pa.BufferReader(path.read_bytes())) as reader:
        table = reader.read_all()
    return {name: values.values for name, values in zip(table["table"].to_pylist(), table["values"], strict=True)}


def _text(values: pa.Array) -> memoryview:
    """The UTF-8 bytes of all strings, one after another."""
    if len(values) == 0:
        return memoryview(b"")
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, dtype=np.int64)
    return memoryview(data)[ends[values.offset] : ends[values.offset + len(values)]] if data is not None else memoryview(b"")


def _fit_vocabularies(config: EncoderConfig, columns: Columns) -> dict[str, pa.Array]:
    """Every look-up in a table counts: those of all its keys, after truncation."""
    lookups: dict[str, list[pa.Array]] = {}
    min_counts: dict[str, int] = {}
    counted_targets: set[str] = set()

    def add(table: str, min_count: int, values: pa.Array) -> None:
        lookups.setdefault(table, []).append(values)
        min_counts[table] = min_count

    for feature in config.features:
        match feature:
            case Categorical() if feature.ids == "vocabulary":
                add(pooled_table(feature), feature.min_count, _present_strings(columns.strings(feature.feature)))
            case Bag() if feature.ids == "vocabulary":
                add(pooled_table(feature), feature.min_count, columns.string_lists(feature.feature).flatten())
            case Sequence():
                items = columns.string_lists(feature.items)
                if feature.ids == "vocabulary":
                    add(item_table(feature), feature.min_count, items.last(feature.max_length).flatten())
                    if feature.target not in counted_targets:
                        counted_targets.add(feature.target)
                        add(item_table(feature), feature.min_count, _present_strings(columns.strings(feature.target)))
                for extra in feature.extra:
                    if extra.edges is None and extra.values is None:
                        values = columns.string_lists(extra.feature).where(items.present).last(feature.max_length)
                        add(extra.feature, extra.min_count, values.flatten())
    return {table: vocabulary(pa.chunked_array(values, type=STRING), min_counts[table]) for table, values in lookups.items()}


def _present_strings(column: Scalars) -> pa.Array:
    return column.values.filter(pa.array(column.present))


def _present_numbers(column: Scalars) -> np.ndarray:
    return np.asarray(column.numbers()[column.present])


def _mean_and_deviation(numbers: np.ndarray) -> tuple[float, float]:
    """The mean and the population standard deviation; a deviation of 0 becomes 1, and no numbers at all give (0, 1)."""
    if len(numbers) == 0:
        return 0.0, 1.0
    return float(numbers.mean()), float(numbers.std()) or 1.0
