# SPDX-License-Identifier: Apache-2.0
"""From finished cells to tables for ``docs/results/ranking.md``: mean and deviation over seeds, paired intervals over users, targets.

``python -m benchmarks.ranking_quality.summary`` prints them as Markdown.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frame import Check, Result
from benchmarks.ranking_quality.data import CACHE, load
from benchmarks.ranking_quality.grid import PEERS, RAW, VERSION, Grid
from recsys.core.files import sha256_json
from recsys.evaluation.bootstrap import Interval, paired_metric_difference
from recsys.evaluation.metrics.auc import WeightedAUC

Record = Mapping[str, Any]
BASELINES = ("dcnv2", "rankmixer")
SCALING = ("tokenmixer_large", "unimixer", "unimixing_lite")
# On Frappe the scaling models must not be below these either.
OTHERS = ("wukong", "hiformer", "dhen", "autoint")
LEVEL, RESAMPLES = 0.95, 500


@dataclass(frozen=True)
class Scored:
    """A model on a data set: its final cells, one for each seed.

    Attributes:
        data: the data set.
        model: the model.
        records: one for each seed, in the order of the seeds.
    """

    data: str
    model: str
    records: tuple[Record, ...]

    def values(self, metric: str) -> list[float]:
        """A metric on test, by seed."""
        return [record["test"][metric] for record in self.records]

    def shown(self, metric: str) -> str:
        """Mean ± standard deviation over seeds."""
        values = self.values(metric)
        deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.4f}{deviation}"


class Comparison:
    """What the finished cells say.

    Args:
        records: of a raw file. Of a model on a data set, those of this version and its newest setting count, whatever was trained before.
        cache: where test predictions and encoded data stand.
    """

    def __init__(self, records: Sequence[Record], cache: Path = CACHE) -> None:
        # A seed that was trained again stands at the end.
        final: dict[tuple[str, str, int], Record] = {}
        for r in records:
            if r["stage"] == "final" and r["version"] == VERSION:
                final.pop((r["data"], r["model"], r["seed"]), None)
                final[r["data"], r["model"], r["seed"]] = r
        newest = {(r["data"], r["model"]): _setting(r) for r in final.values()}
        self.scored = {}
        for pair, setting in newest.items():
            cells = [final[key] for key in sorted(final) if key[:2] == pair and _setting(final[key]) == setting]
            self.scored[pair] = Scored(*pair, tuple(cells))
        self._grid = Grid(RAW, cache=cache)
        self._metric: Callable[[str, str], Any] = lru_cache(maxsize=None)(self._build_metric)
        self.difference: Callable[[str, str, str], Interval | None] = lru_cache(maxsize=None)(self._difference)
        self._part = lru_cache(maxsize=None)(lambda data: load(data, cache).parts["test"])

    def _build_metric(self, data: str, model: str) -> Callable[[np.ndarray], np.ndarray]:
        """From weights of the test rows to the AUC, averaged over seeds."""
        labels = self._part(data).labels
        files = [self._grid.predictions(record["cell"]) for record in self.scored[data, model].records]
        metrics = [WeightedAUC(labels, np.load(file).astype(np.float64)) for file in files]

        def mean(weights: np.ndarray) -> np.ndarray:
            averaged: np.ndarray = np.mean([metric(weights) for metric in metrics], axis=0)
            return averaged

        return mean

    def _difference(self, data: str, ours: str, theirs: str) -> Interval | None:
        """AUC of ``ours`` less that of ``theirs``, each the mean over its seeds, with its interval over users.

        None where one of them is not there, its predictions included.
        """
        for model in (ours, theirs):
            records = self.scored[data, model].records if (data, model) in self.scored else ()
            if not records or not all(self._grid.predictions(record["cell"]).is_file() for record in records):
                return None
        metrics = self._metric(data, ours), self._metric(data, theirs)
        return paired_metric_difference(*metrics, self._part(data).users, resamples=RESAMPLES, level=LEVEL)

    def rows(self) -> list[dict[str, Any]]:
        """The table: a row for each model on each data set, the best AUC first."""
        order = {data: i for i, data in enumerate(dict.fromkeys(data for data, _ in self.scored))}
        scored = sorted(self.scored.values(), key=lambda s: (order[s.data], -statistics.fmean(s.values("auc"))))
        return [self._row(s) for s in scored]

    def _row(self, s: Scored) -> dict[str, Any]:
        row = {"data": s.data, "model": s.model, "seeds": len(s.records), "dense": s.records[0]["dense_parameters"]}
        row |= {name: s.shown(name) for name in ("auc", "logloss", "gauc")}
        for baseline in BASELINES:
            interval = self.difference(s.data, s.model, baseline) if s.model != baseline else None
            row[f"AUC less {baseline}"] = (
                "" if interval is None else f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
            )
        return row | {"seconds": round(statistics.fmean(record["seconds"] for record in s.records))}

    def checks(self) -> list[Check]:
        """The issue's targets, as far as their cells are finished.

        ``not_below``: the upper end of the interval is at least 0. ``above``: the lower end of the best one's is above 0.
        """
        checks = []
        for data in dict.fromkeys(data for data, _ in self.scored):
            others = (*BASELINES, *(OTHERS if data == "frappe" else ()))
            pairs = [(ours, theirs) for ours in SCALING for theirs in others]
            pairs += [("dcnv2", peer) for peer in PEERS]
            for ours, theirs in pairs:
                if (interval := self.difference(data, ours, theirs)) is not None:
                    name = f"{data}_{ours}_not_below_{theirs}".replace("/", "_")
                    checks.append(Check(name, round(interval.high, 5), at_least=0.0, note=f"AUC {interval}"))
        sets = {data for data, _ in self.scored}
        above = {(d, m): i for d in sets for m in SCALING if (i := self.difference(d, m, "dcnv2")) is not None}
        if above:
            (data, model), best = max(above.items(), key=lambda item: item[1].low)
            checks.append(Check("best_above_dcnv2_on_one_set", round(best.low, 5), at_least=1e-5, note=f"{model} on {data}: AUC {best}"))
        return checks


def _setting(record: Record) -> str:
    """What a cell's seeds share."""
    return sha256_json([record[name] for name in ("version", "fingerprint", "point", "budget", "config")])


def result(records: Sequence[Record]) -> Result:
    """The table and the targets, as a benchmark's result."""
    comparison = Comparison(records)
    return Result("ranking_quality", comparison.rows(), comparison.checks(), {"cells": len(records)})


def markdown(found: Result) -> str:
    """The table and the targets for a page."""
    lines: list[str] = []
    if found.rows:
        lines += [_row(list(found.rows[0])), _row(["---"] * len(found.rows[0])), *(_row(list(row.values())) for row in found.rows)]
    lines += ["", "| target | holds | measured |", "| --- | --- | --- |"]
    lines += [_row([check.name, "yes" if check.holds else "no", check.note]) for check in found.checks]
    return "\n".join(lines)


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown(result(Grid(Path(sys.argv[1]) if len(sys.argv) > 1 else RAW).records())))
