# SPDX-License-Identifier: Apache-2.0
"""Frappe, which app a user opens in a context (Baltrunas et al., arXiv 1505.03014); for research only."""

import polars as pl

from recsys.data.datasets.impressions import LABEL, Impressions, ImpressionSource, data_folder, files_fingerprint
from recsys.data.encode import Encoder
from recsys.data.splits import PARTS

FIELDS = ("user_id", "item_id", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city")
ENCODER = Encoder.Config.model_validate(
    {
        "features": [{"kind": "categorical", "feature": name} for name in FIELDS],
        "tasks": [{"name": "use", "feature": LABEL}],
        "groups": {
            "user": ("user_id",),
            "item": ("item_id",),
            "daytime": ("daytime",),
            "week": ("weekday", "isweekend"),
            "state": ("homework", "cost"),
            "weather": ("weather",),
            "place": ("country", "city"),
        },
    }
)
_FILE = "ctr.parquet"


def _frappe() -> Impressions:
    rows = pl.read_parquet(data_folder("frappe") / _FILE)
    rows = rows.with_columns(*(pl.col(name).cast(pl.String) for name in FIELDS), pl.col(LABEL).cast(pl.Float32))
    parts = {part: rows.filter(pl.col("split") == part).select(*FIELDS, LABEL).to_arrow() for part in PARTS}
    return Impressions("frappe", parts, ENCODER)


FRAPPE = ImpressionSource(lambda: files_fingerprint("frappe", (_FILE,)), _frappe)
"""288,609 rows from ``$RECSYS_DATA/frappe`` with the file's own split by log, 70/20/10.

A third is positive: each log has two apps that its user never used. Those were drawn by whoever made the file, not by the publishers of the
data, so figures are near to published ones and not comparable with them digit by digit.
"""
