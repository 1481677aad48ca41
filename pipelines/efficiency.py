# SPDX-License-Identifier: Apache-2.0
"""A trade-off study: a recipe, a trained model asked with less and less, and one page that shows what that saves and costs."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from pipelines.study import StudyRecipe, page
from recsys.bundle.environment import code_commit
from recsys.core import components
from recsys.core.errors import ConfigError
from recsys.core.files import write_bytes, write_json
from recsys.evaluation.figure import COLOURS, INK, svg
from recsys.scaling.lines import Row
from recsys.scaling.retrieval_data import RetrievalData
from recsys.scaling.retrievers import Retrievers
from recsys.scaling.tradeoff import BASELINES, WHOLE, TradeoffPlan, recommended, settings, study
from recsys.training.progress import NoProgress, RichProgress

_COSTS = {"events": "events", "macs": "multiply-adds", "gathered_bytes": "gathered bytes", "ms": "ms"}


class EfficiencyRecipe(StudyRecipe, TradeoffPlan):
    """A trade-off study."""


@dataclass(frozen=True)
class Line:
    """A method at a budget, over the seeds.

    Attributes:
        method: its label.
        budget: the share of each history.
        ndcg: NDCG@10 on test, of each seed.
        valid: on validation, of each seed.
        cost: of one history, means over the seeds.
        less: means over the seeds of paired differences on test, ``[estimate, low, high]`` each: ``less_whole`` and ``less_last``.
    """

    method: str
    budget: float
    ndcg: Sequence[float]
    valid: Sequence[float]
    cost: Mapping[str, float]
    less: Mapping[str, Sequence[float]]


def execute(recipe: EfficiencyRecipe, directory: Path, console: Console) -> tuple[list[Line], tuple[str, float] | None]:
    """Train, measure and write ``cells.jsonl``, ``efficiency.csv``, ``efficiency.svg``, ``report.html`` and ``summary.json``.

    Returns:
        The lines, and the recommended method and budget.

    Raises:
        ConfigError: the recipe's data are no histories.
    """
    data = components.build("scaling_data", recipe.data)
    if not isinstance(data, RetrievalData):
        raise ConfigError(f"data: expected histories for a retriever, got {recipe.data.name!r}")
    subject = Retrievers(data, directory / "shared")
    wanted, rows = len(settings(recipe)) * len(recipe.seeds), list[Row]()
    progress = NoProgress() if console.quiet else RichProgress(recipe.name)
    for done, row in enumerate(study(recipe, subject, directory, code_commit(), progress), 1):
        rows.append(row)
        what = f"{row['method']} at {row['budget']:g}, seed {row['seed']}"
        console.print(f"[dim]{done}/{wanted}[/]  {what}: NDCG@10 {row['test']['ndcg@10']:.4f}", highlight=False)
    lines, best = _lines(recipe, rows), recommended(recipe, rows)
    _write(recipe, directory, lines, best)
    return lines, best


def show(lines: Sequence[Line], best: tuple[str, float] | None, console: Console) -> None:
    """Print the table and the recommendation."""
    grid = Table("method", "budget", "NDCG@10", "less whole", *_COSTS.values(), box=None, header_style="dim")
    for line in lines:
        grid.add_row(*_cells(line))
    console.print(grid)
    console.print(_sentence(best), highlight=False)


def _lines(recipe: EfficiencyRecipe, rows: Sequence[Row]) -> list[Line]:
    found = []
    for setting in settings(recipe):
        own = [row for row in rows if (row["method"], row["budget"]) == (setting.method, setting.budget)]
        less: dict[str, Sequence[float]] = {
            name: np.mean([row[name] for row in own], axis=0).tolist() for name in ("less_whole", "less_last") if name in own[0]
        }
        cost = {name: float(np.mean([row["cost"][name] for row in own])) for name in own[0]["cost"]}
        ndcg, valid = ([float(row[part]["ndcg@10"]) for row in own] for part in ("test", "valid"))
        found.append(Line(setting.method, setting.budget, ndcg, valid, cost, less))
    return found


def _cells(line: Line) -> list[str]:
    less = line.less.get("less_whole")
    difference = "" if less is None else f"{less[0]:+.4f} [{less[1]:+.4f}, {less[2]:+.4f}]"
    costs = [f"{line.cost[name]:.3g}" if name in ("ms", "events") else f"{line.cost[name]:,.0f}" for name in _COSTS]
    return [line.method, f"{line.budget:g}", f"{np.mean(line.ndcg):.4f}", difference, *costs]


def _sentence(best: tuple[str, float] | None) -> str:
    if best is None:
        return "No setting keeps enough of the quality: ask the model with whole histories."
    return f"Recommended, the cheapest that keeps enough of the quality on validation: {best[0]} at {best[1]:g}."


def _write(recipe: EfficiencyRecipe, directory: Path, lines: Sequence[Line], best: tuple[str, float] | None) -> None:
    picture = _picture(lines)
    write_bytes(directory / "efficiency.svg", picture.encode())
    write_bytes(directory / "efficiency.csv", _csv(lines).encode())
    header = "".join(f"<th>{name}</th>" for name in ("method", "budget", "NDCG@10", "less whole", *_COSTS.values()))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(line)) + "</tr>" for line in lines)
    section = f"<p>{html.escape(_sentence(best))}</p>\n{picture}\n<table><tr>{header}</tr>{body}</table>"
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    write_bytes(directory / "report.html", page(f"{recipe.name}: quality against cost", section, text).encode())
    write_json(
        directory / "summary.json",
        {
            "recipe": recipe.name,
            "commit": code_commit(),
            "seeds": list(recipe.seeds),
            "recommended": None if best is None else {"method": best[0], "budget": best[1]},
            "lines": [vars(line) for line in lines],
        },
    )


def _csv(lines: Sequence[Line]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "budget", "ndcg@10", "valid", *_COSTS, "whole_ms"])
    for line in lines:
        means = (float(np.mean(values)) for values in (line.ndcg, line.valid))
        writer.writerow([line.method, line.budget, *means, *(line.cost[name] for name in (*_COSTS, "whole_ms"))])
    return stream.getvalue()


def _picture(lines: Sequence[Line]) -> str:
    """NDCG@10 on test against multiply-adds and against milliseconds, one curve for each method; baselines are dashed."""
    whole = next(line for line in lines if line.method == WHOLE)
    methods = dict.fromkeys(line.method for line in lines if line.method != WHOLE)

    def draw(panels: Sequence[Axes]) -> None:
        for axes, cost in zip(panels, ("macs", "ms"), strict=True):
            axes.axhline(float(np.mean(whole.ndcg)), color=INK, linewidth=0.8, linestyle=":")
            axes.plot(whole.cost[cost], float(np.mean(whole.ndcg)), "o", color=INK, markersize=5, label=WHOLE)
            for colour, method in zip(cycle(COLOURS), [*(m for m in methods if m not in BASELINES), *BASELINES], strict=False):
                own = sorted((line for line in lines if line.method == method), key=lambda line: line.budget)
                x, y = [line.cost[cost] for line in own], [float(np.mean(line.ndcg)) for line in own]
                style = "--" if method in BASELINES else "-"
                axes.plot(x, y, style, marker="o", markersize=3.5, linewidth=1.3, color=colour, label=method)
            axes.set_xlabel(f"{_COSTS[cost]} for each history")
        panels[0].set_ylabel("NDCG@10")
        panels[-1].legend(loc="lower right", frameon=False, fontsize=7)

    return svg(draw, columns=2, size=(9.6, 3.6), sharey=True)
