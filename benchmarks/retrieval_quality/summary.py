# SPDX-License-Identifier: Apache-2.0
"""From finished cells to tables for ``docs/results/retrieval.md``: mean and deviation over seeds, paired intervals over users, targets.

``python -m benchmarks.retrieval_quality.summary`` prints them as Markdown.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.frame import Check, Result
from benchmarks.retrieval_quality.data import Dataset, load
from benchmarks.retrieval_quality.grid import EVERY, VERSION, Grid
from recsys.evaluation.bootstrap import Interval, paired_mean_difference
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import slices

BASELINE = "sasrec"
# Marks of the literature for the same protocol: docs/results/retrieval.md says whose.
TARGETS = (("beauty", "sasrec", "recall@10", 0.088), ("ml_1m", "sasrec", "recall@10", 0.2853), ("ml_1m", "hstu", "recall@10", 0.3097))


@dataclass(frozen=True)
class Scored:
    """A model on a data set: one record and the ranks of the test events for each seed."""

    data: str
    model: str
    records: tuple[Mapping[str, Any], ...]
    ranks: tuple[np.ndarray, ...]

    def mean(self, metric: str) -> float:
        """Over seeds."""
        return statistics.fmean(record["test"][metric] for record in self.records)

    def shown(self, metric: str) -> str:
        """Mean ± standard deviation over seeds."""
        values = [record["test"][metric] for record in self.records]
        return f"{self.mean(metric):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    def by_event(self, metric: str) -> np.ndarray:
        """float64 ``[targets]``: the mean over seeds."""
        name, _, k = metric.partition("@")
        values = {"recall": recall_at, "ndcg": ndcg_at}[name]
        found: np.ndarray = np.mean([values(ranks, int(k)) for ranks in self.ranks], axis=0)
        return found


def scored(grid: Grid) -> dict[tuple[str, str], Scored]:
    """The finished models whose ranks are at hand; of a model on a data set, the newest configuration."""
    final = [r for r in grid.records() if r["stage"] == "final" and r["version"] == VERSION and grid.ranks(r["cell"]).is_file()]
    newest = {(r["data"], r["model"]): r["config"] for r in final}
    found = {}
    for (data, model), config in newest.items():
        by_seed = {r["seed"]: r for r in final if (r["data"], r["model"]) == (data, model) and r["config"] == config}
        records = tuple(by_seed[seed] for seed in sorted(by_seed))
        found[data, model] = Scored(data, model, records, tuple(np.load(grid.ranks(r["cell"])) for r in records))
    return found


def difference(ours: Scored, theirs: Scored, data: Dataset, metric: str, mask: np.ndarray) -> Interval:
    """Ours less theirs over the targets of a slice, paired, with its interval over users."""
    users = np.asarray(data.split.test.user_id.to_pylist())[mask]
    return paired_mean_difference(ours.by_event(metric)[mask], theirs.by_event(metric)[mask], users, resamples=500)


def tables(grid: Grid, datasets: Mapping[str, Dataset]) -> tuple[list[dict[str, Any]], list[Check]]:
    """A row for each model and slice, and the targets that could be measured."""
    found, rows = scored(grid), []
    for (name, model), own in found.items():
        data = datasets[name]
        base = found.get((name, BASELINE))
        for part, mask in slices(data.data, data.split.train, data.split.test, data.count).items():
            if not mask.any() or part in ("new", "empty_user"):
                continue
            row: dict[str, Any] = {"data": name, "model": model, "slice": part, "targets": int(mask.sum()), "seeds": len(own.records)}
            row |= {m: own.shown(m) if part == "all" else f"{own.by_event(m)[mask].mean():.4f}" for m in EVERY}
            less = "" if base is None or model == BASELINE else str(difference(own, base, data, "ndcg@10", mask))
            rows.append(row | {f"ndcg@10 less {BASELINE}": less})
    checks = [
        Check(f"{name}_{model}_{metric.replace('@', '_')}", round(found[name, model].mean(metric), 4), at_least=bound)
        for name, model, metric, bound in TARGETS
        if (name, model) in found
    ]
    return rows, checks


def run(*, quick: bool) -> Result:
    """What the finished cells say; ``quick`` leaves the slices out."""
    grid = Grid()
    rows, checks = tables(grid, {name: load(name) for name in sorted({data for data, _ in scored(grid)})})
    return Result("retrieval_quality", [row for row in rows if not quick or row["slice"] == "all"], checks)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a table."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Print the tables."""
    result = run(quick=False)
    checks = [{"target": c.name, "holds": "yes" if c.holds else "no", "measured": c.value, "at least": c.at_least} for c in result.checks]
    print(markdown(result.rows), markdown(checks), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
