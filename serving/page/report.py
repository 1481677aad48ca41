# SPDX-License-Identifier: Apache-2.0
"""The figures of a bundle's ``metrics.json`` that the page draws."""

import math
from collections.abc import Mapping
from typing import Any

from serving.page.schemas import BarOut, PlotOut

_SHOWN = (
    ("ranking", "auc", "Ranking: AUC"),
    ("retrieval", "recall@10", "Retrieval: recall@10"),
    ("retrieval", "ndcg@10", "Retrieval: NDCG@10"),
    ("list", "ndcg@10", "The final list: NDCG@10"),
)
_INTERVALS = "Differences with their 95% intervals"


def plots_of(metrics: Mapping[str, Any]) -> list[PlotOut]:
    """What there is to draw; a figure that is absent, null or not finite is left out, and so is a plot without figures."""
    plots = [PlotOut(title=title, bars=_bars(metrics.get(section, {}), figure)) for section, figure, title in _SHOWN]
    plots.append(PlotOut(title=_INTERVALS, bars=_intervals(metrics.get("intervals", {}))))
    return [plot for plot in plots if plot.bars]


def _bars(models: Mapping[str, Mapping[str, Any]], figure: str) -> list[BarOut]:
    # The recipe's ranker stands under its own name, too.
    values = {name: figures.get(figure) for name, figures in models.items() if name != "ranker"}
    return [BarOut(name=_readable(name), value=value) for name, value in values.items() if _finite(value)]


def _intervals(intervals: Mapping[str, Mapping[str, Any]]) -> list[BarOut]:
    return [
        BarOut(name=_readable(name), value=found["estimate"], low=found["low"], high=found["high"])
        for name, found in intervals.items()
        if all(_finite(found.get(part)) for part in ("estimate", "low", "high"))
    ]


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
