# SPDX-License-Identifier: Apache-2.0
"""Feast's offline store for Parquet files, with our point-in-time join.

.. code-block:: yaml

    offline_store:
      type: feature_store.feast.offline_store.RecsysOfflineStore
      created_is_available: false

Every row of the entity data frame comes back once, in its place. What is read to materialize, and what is logged, goes Feast's own way.
"""

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.infra.offline_stores.dask import DaskOfflineStore, DaskOfflineStoreConfig, DaskRetrievalJob
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.utils import _get_requested_feature_views_to_features_dict

from feature_store.feast.join import join_key, newest_rows
from recsys.core.errors import SchemaError, unknown


class RecsysOfflineStoreConfig(DaskOfflineStoreConfig):
    """The section ``offline_store`` of ``feature_store.yaml``.

    Attributes:
        type: the path of the class.
        created_is_available: whether a row counts only from its created time on, where its source has one. Feast's own stores let a row
            count from its event time on, even if it was written later; so does this one by default.
    """

    type: Literal["feature_store.feast.offline_store.RecsysOfflineStore"] = "feature_store.feast.offline_store.RecsysOfflineStore"  # type: ignore[assignment]
    created_is_available: bool = False


class _Job(DaskRetrievalJob):
    """A join that is made when its result is asked for; the function gives an Arrow table."""

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self.evaluation_function()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame


class RecsysOfflineStore(DaskOfflineStore):
    """See the module."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **others: Any,
    ) -> RetrievalJob:
        """The features of each row of ``entity_df`` as known at its event timestamp.

        Raises:
            SchemaError: when the job runs: a column is absent or of another type.
            ValueError: ``entity_df`` is no data frame, or a view's source no Parquet file.
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise ValueError(f"entity_df: expected a pandas data frame, got {type(entity_df).__name__}")
        time = infer_event_timestamp_from_entity_df(dict(zip(entity_df.columns, entity_df.dtypes, strict=True)))
        wanted, _ = _get_requested_feature_views_to_features_dict(
            feature_refs, feature_views, registry.list_on_demand_feature_views(project)
        )
        times = pd.to_datetime(entity_df[time], utc=True)

        def evaluate() -> pa.Table:
            spine = pa.Table.from_pandas(entity_df.assign(**{time: times}), preserve_index=False).replace_schema_metadata(None)
            for view, features in wanted.items():
                for name, values in _features(config, view, features, spine, time).items():
                    output = f"{view.projection.name_to_use()}__{name}" if full_feature_names else name
                    spine = _with_column(spine, output, values)
            return spine

        metadata = RetrievalMetadata(feature_refs, [name for name in entity_df.columns if name != time], times.min(), times.max())
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        return _Job(evaluate, full_feature_names, str(config.repo_path), on_demand, metadata)


def _features(config: RepoConfig, view: FeatureView, features: Sequence[str], spine: pa.Table, time: str) -> dict[str, pa.ChunkedArray]:
    """The values of a view's features for each row of the spine."""
    source = view.batch_source
    created = source.created_timestamp_column or None
    keys = [column.name for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
    names = dict.fromkeys([*keys, source.timestamp_field, *([created] if created else []), *features])
    rows = _read(config, view, list(names))
    # A row belongs to the entity whose key it has, as the type that the table keeps keys in.
    asked = [_as(_column(spine, view.projection.join_key_map.get(key, key)), rows.column(key).type, key) for key in keys]
    newest = newest_rows(
        join_key(asked, spine.num_rows),
        spine.column(time).combine_chunks(),
        join_key([rows.column(key) for key in keys], rows.num_rows),
        rows.column(source.timestamp_field).combine_chunks(),
        ttl=view.ttl,
        created=rows.column(created).combine_chunks() if created else None,
        created_is_available=config.offline_store.created_is_available,
    )
    return {name: rows.column(name).take(newest) for name in features}


def _read(config: RepoConfig, view: FeatureView, names: list[str]) -> pa.Table:
    """Columns of a view's source, by the names that the view gives them."""
    source = view.batch_source
    if not isinstance(source, FileSource) or not isinstance(source.file_format or ParquetFormat(), ParquetFormat):
        raise ValueError(f"view {view.name!r}: expected a FileSource of Parquet, got {type(source).__name__} {source.name!r}")
    uri = FileSource.get_uri_for_file_path(config.repo_path, source.path)
    filesystem, path = FileSource.create_filesystem_and_path(str(uri), source.file_options.s3_endpoint_override)
    stored = {given: column for column, given in source.field_mapping.items()}
    columns = [stored.get(name, name) for name in names]
    table = pq.read_table(path, filesystem=filesystem, columns=list(dict.fromkeys(columns)))
    return pa.table([_column(table, column) for column in columns], names=names)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise SchemaError(unknown("column", name, table.column_names))
    return table.column(name)


def _as(column: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return pc.cast(column, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SchemaError(f"entity_df: column {name!r}: expected {kind}, got {column.type}: {error}") from None


def _with_column(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    """A further column, or the one of this name anew, as Feast does it for a feature that is also in the entity data frame."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)
