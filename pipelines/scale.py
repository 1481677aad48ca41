# SPDX-License-Identifier: Apache-2.0
"""A scaling study: a recipe, the sweep along one axis, the laws, and one page that shows them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table

from pipelines.study import StudyRecipe, load, page
from recsys.bundle.environment import code_commit
from recsys.core import components
from recsys.core.config import Config
from recsys.core.errors import ConfigError, unknown
from recsys.core.files import write_bytes, write_json
from recsys.evaluation.bootstrap import Interval
from recsys.scaling.plot import Baseline, Fits, Point, figure, fits, points, section, slices, table
from recsys.scaling.subject import Measures, Subject
from recsys.scaling.sweep import Axis, Plan, cells, subject_of, sweep
from recsys.training.progress import NoProgress, RichProgress

_X: dict[Axis, tuple[str, ...]] = {"params": ("params", "flops"), "flops": ("params", "flops"), "data": ("rows",)}


class FitConfig(Config):
    """How laws are fitted.

    Attributes:
        baseline: what the gain is measured against: a number, a value that the data know (such as ``only_main`` of planted data, or
            ``popularity`` of histories), or an architecture's label, whose smallest point is the baseline.
        resamples: draws of seeds for the intervals; 0 for none.
        level: of the intervals.
    """

    baseline: float | str
    resamples: int = Field(500, ge=0)
    level: float = Field(0.95, gt=0, lt=1)


class ScaleRecipe(StudyRecipe, Plan):
    """A scaling study.

    Attributes:
        fit: the laws.
    """

    fit: FitConfig


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        directory: where its files stand.
        found: the points.
        baseline: of the gains.
        laws: one for each x of the axis.
        references: what is known of the data.
        measures: of the points.
    """

    directory: Path
    found: list[Point]
    baseline: Baseline
    laws: list[Fits]
    references: dict[str, float]
    measures: Measures


def load_scale_recipe(recipe: str, overrides: Sequence[str] = (), *, quick: bool = False) -> ScaleRecipe:
    """See `pipelines.study.load`."""
    return load(ScaleRecipe, recipe, overrides, quick=quick)


def execute(recipe: ScaleRecipe, axis: Axis, directory: Path, console: Console, only: Sequence[str] = ()) -> Study:
    """Sweep, fit and write ``cells.jsonl``, ``scaling.csv``, ``scaling.svg``, ``report.html`` and ``summary.json``.

    Where slices are measured there is a picture of them, ``slices.svg``; a folder ``shared`` holds what several cells read. Cells that
    ``directory`` holds already are not trained again.

    Args:
        recipe: what to study.
        axis: what grows.
        directory: of the results.
        console: where progress is shown.
        only: labels of architectures; all by default.
    """
    recipe = _chosen(recipe, only)
    subject = subject_of(components.build("scaling_data", recipe.data), directory)
    references, measures = dict(subject.references()), subject.measures
    rows = _sweep(recipe, subject, axis, directory, console)
    found = points(rows, measures)
    baseline = _baseline(recipe.fit.baseline, found, references, axis, measures)
    laws = [fits(found, baseline, x, measures, resamples=recipe.fit.resamples, level=recipe.fit.level) for x in _X[axis]]
    study = Study(directory, found, baseline, laws, references, measures)
    _write(study, recipe, axis)
    return study


def _chosen(recipe: ScaleRecipe, only: Sequence[str]) -> ScaleRecipe:
    labels = [architecture.label for architecture in recipe.architectures]
    for label in only:
        if label not in labels:
            raise ConfigError(f"--only: {unknown('architecture', label, labels)}")
    kept = tuple(a for a in recipe.architectures if not only or a.label in only)
    return recipe.model_copy(update={"architectures": kept})


def _sweep(recipe: ScaleRecipe, subject: Subject, axis: Axis, directory: Path, console: Console) -> list[dict[str, Any]]:
    wanted = cells(recipe, subject, axis)
    console.print(f"[dim]{len(wanted)} cells: {len(recipe.architectures)} architectures, {len(recipe.seeds)} seeds[/]")
    progress = NoProgress() if console.quiet else RichProgress(recipe.name)
    rows = []
    for done, (cell, row, trained) in enumerate(sweep(recipe, subject, wanted, directory, commit=code_commit(), progress=progress), 1):
        how = f"{row['seconds']:.0f} s" if trained else "there already"
        name = f"{cell.architecture} {cell.size}, {cell.rows:,} {subject.measures.x['rows']}, seed {cell.seed}"
        result = f"{subject.measures.gain.name} {row['metrics'][subject.measures.gain.key]:.4f}"
        console.print(f"[dim]{done}/{len(wanted)}[/]  {name}: {result}  [dim]{how}[/]", highlight=False)
        # Labels and costs are the plan's own: the same training may stand in the file under an older label.
        rows.append(row | {"architecture": cell.architecture, "size": cell.size})
    return rows


def _baseline(wanted: float | str, found: list[Point], references: dict[str, float], axis: Axis, measures: Measures) -> Baseline:
    if not isinstance(wanted, str):
        return Baseline(f"{wanted:g}", [wanted])
    if wanted in references:
        return Baseline(wanted.replace("_", " "), [references[wanted]])
    own = [point for point in found if point.architecture == wanted]
    if not own:
        known = [*references, *dict.fromkeys(point.architecture for point in found)]
        raise ConfigError(f"fit.baseline: {unknown('reference or architecture', wanted, known)}")
    point = min(own, key=lambda point: point.x[_X[axis][0]])
    return Baseline(f"{wanted} {point.size}", point.metrics[measures.gain.key], point)


def _write(study: Study, recipe: ScaleRecipe, axis: Axis) -> None:
    measures = study.measures
    pictures = {"scaling.svg": figure(study.found, study.baseline, study.laws, study.references.get(measures.gain.key), measures)}
    if measures.slices:
        pictures["slices.svg"] = slices(study.found, _X[axis][0], measures)
    for name, svg in pictures.items():
        write_bytes(study.directory / name, svg.encode())
    write_bytes(study.directory / "scaling.csv", table(study.found, study.baseline, measures).encode())
    body = section(study.found, study.baseline, study.laws, study.references, "\n".join(pictures.values()), measures)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    write_bytes(study.directory / "report.html", page(f"{recipe.name}: scaling in {axis}", body, text).encode())
    write_json(study.directory / "summary.json", summary(study, recipe, axis))


def summary(study: Study, recipe: ScaleRecipe, axis: Axis) -> dict[str, Any]:
    """The study as JSON: laws with intervals by x and architecture, points, the baseline, and what is known of the data."""
    laws = {
        law.x: {
            "gain": {name: {"coefficient": _json(f.coefficient), "exponent": _json(f.exponent)} for name, f in law.gain.items()},
            "loss": {
                name: {"coefficient": _json(f.coefficient), "exponent": _json(f.exponent), "floor": _json(f.floor)}
                for name, f in law.loss.items()
            },
            "refused": law.refused,
        }
        for law in study.laws
    }
    found = [
        {"architecture": point.architecture, "size": point.size, **point.x, **{k: list(v) for k, v in point.metrics.items()}}
        for point in study.found
    ]
    return {
        "recipe": recipe.name,
        "axis": axis,
        "seeds": list(recipe.seeds),
        "commit": code_commit(),
        "baseline": {"name": study.baseline.name, study.measures.gain.key: study.baseline.mean},
        "references": study.references,
        "laws": laws,
        "points": found,
    }


def _json(interval: Interval) -> dict[str, float | None]:
    ends = {"low": interval.low, "high": interval.high}
    return {"estimate": interval.estimate} | {name: None if value != value else value for name, value in ends.items()}


def show(study: Study, console: Console) -> None:
    """Print the exponents."""
    for law in study.laws:
        gain = f"{study.measures.gain.name} gain over {study.baseline.name} ∝ {law.x}^a"
        grid = Table("architecture", gain, f"{study.measures.loss.name} − L∞ ∝ {law.x}^a", box=None, header_style="dim")
        for name in dict.fromkeys(point.architecture for point in study.found):
            shown = [str(fitted[name].exponent) if name in fitted else "–" for fitted in (law.gain, law.loss)]
            grid.add_row(name, *shown)
        console.print(grid)
        for reason in law.refused:
            console.print(f"[yellow]{reason}[/]", highlight=False)
