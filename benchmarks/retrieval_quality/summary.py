# SPDX-License-Identifier: Apache-2.0
"""From finished cells to tables: mean and deviation over seeds, paired intervals over users, targets.

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
from benchmarks.retrieval_quality.grid import EVERY, VERSION, Grid, read_ranks
from recsys.evaluation.retrieval import compare, slices

BASELINE = "sasrec"
# Marks of the literature for leave-one-out and full ranking: independent re-runs and TIGER's paper for Beauty (RPG's less .005), HSTU's
# authors for MovieLens-1M. ``test`` ranks without the items of the history, as HSTU's authors do, ``test_with_seen`` with them, as RPG's.
TARGETS = (
    ("beauty", "sasrec", "test", "recall@10", 0.088),
    ("beauty", "sasrec", "test_with_seen", "recall@10", 0.088),
    ("beauty", "rpg", "test_with_seen", "recall@10", 0.0739),
    ("beauty", "tiger", "test", "recall@10", 0.0648),
    ("beauty", "tiger", "test", "ndcg@10", 0.0384),
    ("ml_1m", "sasrec", "test", "recall@10", 0.2853),
    ("ml_1m", "sasrec", "test", "ndcg@10", 0.1603),
    ("ml_1m", "hstu", "test", "recall@10", 0.3097),
    ("ml_1m", "hstu", "test", "ndcg@10", 0.1720),
)
ABOVE = (("beauty", "setrec"),)  # the baseline in NDCG@10, by the whole interval


@dataclass(frozen=True)
class Scored:
    """A model on a data set: one record and the ranks of the test events for each seed."""

    data: str
    model: str
    records: tuple[Mapping[str, Any], ...]
    ranks: tuple[np.ndarray, ...]

    def mean(self, metric: str, of: str = "test") -> float:
        """Over seeds; ``of`` is the way of ranking."""
        return statistics.fmean(record[of][metric] for record in self.records)

    def shown(self, metric: str) -> str:
        """Mean ± standard deviation over seeds."""
        values = [record["test"][metric] for record in self.records]
        return f"{self.mean(metric):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def scored(grid: Grid) -> dict[tuple[str, str], Scored]:
    """The finished models whose ranks are at hand; of a model on a data set, the newest configuration and files."""
    final = [r for r in grid.records() if r["stage"] == "final" and r["version"] == VERSION and grid.complete(r)]
    newest = {(r["data"], r["model"]): (_shared(r["config"]), r["fingerprint"]) for r in final}
    found = {}
    for (data, model), setting in newest.items():
        same = [r for r in final if (r["data"], r["model"]) == (data, model) and (_shared(r["config"]), r["fingerprint"]) == setting]
        by_seed = {r["seed"]: r for r in same}
        records = tuple(by_seed[seed] for seed in sorted(by_seed))
        found[data, model] = Scored(data, model, records, tuple(read_ranks(grid.ranks(r["cell"])) for r in records))
    return found


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's configuration without the collaborative model, of which every seed has its own."""
    items = {key: value for key, value in config.get("items", {}).items() if key != "collaborative"}
    return {**config, "items": items}


def tables(grid: Grid, datasets: Mapping[str, Dataset]) -> tuple[list[dict[str, Any]], list[Check]]:
    """A row for each model and slice, and the targets that could be measured."""
    found, rows = scored(grid), []
    above: list[Check] = []
    for name, data in datasets.items():
        own = {model: one for (of, model), one in found.items() if of == name}
        chosen = slices(data.data, data.split.train, data.split.test, data.count)
        wanted = {part: mask for part, mask in chosen.items() if part not in ("new", "empty_user")}
        baseline = BASELINE if BASELINE in own else next(iter(own))
        ranks = {model: one.ranks for model, one in own.items()}
        for row in compare(ranks, data.split.test, wanted, baseline=baseline, cutoffs=(5, 10), resamples=500):
            one = own[row.model]
            shown = {m: one.shown(m) if row.slice == "all" else f"{row.metrics[m]:.4f}" for m in EVERY}
            difference = row.differences.get("ndcg@10")
            less = {f"ndcg@10 less {baseline}": "" if difference is None else str(difference)}
            if difference is not None and row.slice == "all" and (name, row.model) in ABOVE:
                above.append(Check(f"{name}_{row.model}_above_{baseline}_ndcg_10", round(difference.low, 4), at_least=0.0))
            seen = {
                f"{m} with seen": f"{one.mean(m, 'test_with_seen'):.4f}" if row.slice == "all" else "" for m in ("recall@10", "ndcg@10")
            }
            about = {"data": name, "model": row.model, "slice": row.slice, "targets": row.targets, "seeds": len(one.records)}
            rows.append(about | shown | seen | less)
    checks = [
        Check(
            f"{name}_{model}_{metric.replace('@', '_')}{of.removeprefix('test')}",
            round(found[name, model].mean(metric, of), 4),
            at_least=bound,
        )
        for name, model, of, metric, bound in TARGETS
        if (name, model) in found
    ]
    return rows, checks + above


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
