# SPDX-License-Identifier: Apache-2.0
"""From the lines of a sweep to points, laws, a table, a picture, and a section of a page."""

import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from recsys.core.errors import DataError
from recsys.evaluation.bootstrap import Interval
from recsys.evaluation.figure import COLOURS, INK, svg
from recsys.scaling.fit import Law, fit_gain, fit_loss
from recsys.scaling.subject import Measure, Measures

_X = ("params", "flops", "rows")


@dataclass(frozen=True)
class Point:
    """The seeds of one size of one architecture, on so much data.

    Attributes:
        architecture: its label.
        size: its label.
        x: ``params``, ``flops`` and ``rows``.
        metrics: the measures of each seed by key; one that some seed has no value of is left out.
    """

    architecture: str
    size: str
    x: Mapping[str, float]
    metrics: Mapping[str, Sequence[float]]

    def mean(self, metric: str) -> float:
        """Over the seeds."""
        return float(np.mean(self.metrics[metric]))

    def spread(self, metric: str) -> float:
        """The standard deviation over the seeds; 0 for one."""
        return float(np.std(self.metrics[metric], ddof=1)) if len(self.metrics[metric]) > 1 else 0.0


@dataclass(frozen=True)
class Baseline:
    """What gains are measured against: a known value, or the seeds of an architecture's size, which is then left out of the fits."""

    name: str
    values: Sequence[float]
    point: Point | None = None

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.values))


@dataclass(frozen=True)
class Fits:
    """The laws of one x by architecture, and the reason where there is none.

    Attributes:
        x: ``params``, ``flops`` or ``rows``.
        gain: of the gain over the baseline.
        loss: of the loss.
        refused: ``architecture: reason`` of each fit that is not defined.
    """

    x: str
    gain: dict[str, Law] = field(default_factory=dict)
    loss: dict[str, Law] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def points(rows: Sequence[Mapping[str, Any]], measures: Measures) -> list[Point]:
    """The lines of cells, seeds of the same cell together, in the order of their first lines."""
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["architecture"], row["size"], row["rows"]), []).append(row)
    return [
        Point(
            architecture,
            size,
            {"params": same[0]["params"]["dense"], "flops": same[0]["flops"], "rows": amount},
            {m.key: [row["metrics"][m.key] for row in same] for m in measures.all if all(m.key in row["metrics"] for row in same)},
        )
        for (architecture, size, amount), same in found.items()
    ]


def fits(found: Sequence[Point], baseline: Baseline, x: str, measures: Measures, *, resamples: int, level: float, seed: int = 0) -> Fits:
    """Both laws of every architecture. A fit that is not defined is named with its reason, and the others go on."""
    laws = Fits(x)
    for architecture in dict.fromkeys(point.architecture for point in found):
        own = [point for point in found if point.architecture == architecture]
        options = {"resamples": resamples, "level": level, "seed": seed}
        try:
            scaled = [point for point in own if point is not baseline.point]
            laws.gain[architecture] = fit_gain(_samples(scaled, x, measures.gain.key), baseline.values, **options)  # type: ignore[arg-type]
        except DataError as error:
            laws.refused.append(f"{architecture}: {error}")
        try:
            laws.loss[architecture] = fit_loss(_samples(own, x, measures.loss.key), **options)  # type: ignore[arg-type]
        except DataError as error:
            laws.refused.append(f"{architecture}: {error}")
    return laws


def _samples(found: Sequence[Point], x: str, metric: str) -> dict[float, list[float]]:
    samples: dict[float, list[float]] = {}
    for point in found:
        samples.setdefault(float(point.x[x]), []).extend(point.metrics.get(metric, ()))
    return samples


def table(found: Sequence[Point], baseline: Baseline, measures: Measures) -> str:
    """One line for each point, as CSV with a header; what a point has no value of is left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    gain, loss = measures.gain.key, measures.loss.key
    names = (gain, f"{gain}_sd", "gain", loss, f"{loss}_sd", *(measure.key for measure in measures.beside))
    writer.writerow(["architecture", "size", *_X, "seeds", *names])
    for point in found:
        values = {gain: point.mean(gain), f"{gain}_sd": point.spread(gain), "gain": point.mean(gain) - baseline.mean}
        values |= {name: point.mean(name) for name in point.metrics}
        if loss in point.metrics:
            values[f"{loss}_sd"] = point.spread(loss)
        sizes = [int(point.x[x]) for x in _X]
        shown = [f"{values[name]:.6f}" if name in values else "" for name in names]
        writer.writerow([point.architecture, point.size, *sizes, len(point.metrics[gain]), *shown])
    return out.getvalue()


def figure(found: Sequence[Point], baseline: Baseline, laws: Sequence[Fits], bound: float | None, measures: Measures) -> str:
    """Gain over the baseline against each law's x, as SVG text that can stand in a page.

    Points are means with whiskers of a standard deviation over seeds, curves are laws with their bands, and the dashed line is the bound.

    Args:
        found: the points.
        baseline: of the gains.
        laws: one panel for each.
        bound: the highest value that is possible, where it is known.
        measures: of the points.
    """

    def draw(axes: Sequence[Axes]) -> None:
        for axis, law in zip(axes, laws, strict=True):
            _panel(axis, found, measures.gain, baseline.mean, law.x, law)
            axis.set_xlabel(measures.x[law.x])
            if bound is not None:
                axis.axhline(bound - baseline.mean, color=INK, linewidth=1, linestyle="--", label="Bayes bound")
        axes[0].set_ylabel(f"{measures.gain.name} over {baseline.name}")
        _legend(axes)

    return svg(draw, columns=len(laws), size=(4.2 * len(laws) + 1.6, 3.4), sharey=True)


def slices(found: Sequence[Point], x: str, measures: Measures) -> str:
    """Each of the measures' slices against one x, a panel for each, as SVG text; no law is fitted to them."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, measure in zip(axes, measures.slices, strict=True):
            _panel(axis, found, measure, 0.0, x, Fits(x))
            axis.set_xlabel(measures.x[x])
            axis.set_title(measure.name, fontsize=9)
        _legend(axes)

    return svg(draw, columns=len(measures.slices), size=(4.2 * len(measures.slices) + 1.6, 3.4))


def _legend(axes: Sequence[Axes]) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _panel(axis: Axes, found: Sequence[Point], measure: Measure, zero: float, x: str, laws: Fits) -> None:
    axis.set_xscale("log")
    for number, architecture in enumerate(dict.fromkeys(point.architecture for point in found)):
        colour = COLOURS[number % len(COLOURS)]
        own = [point for point in found if point.architecture == architecture and measure.key in point.metrics]
        xs = np.array([point.x[x] for point in own])
        values, spread = [p.mean(measure.key) - zero for p in own], [p.spread(measure.key) for p in own]
        axis.errorbar(xs, values, yerr=spread, fmt="o", color=colour, markersize=4, linewidth=1, label=architecture)
        if architecture in laws.gain:
            law, line = laws.gain[architecture], np.geomspace(xs.min(), xs.max(), 60)
            axis.plot(line, law(line), color=colour, linewidth=1.5)
            if len(law.draws):
                axis.fill_between(line, *law.band(line), color=colour, alpha=0.14, linewidth=0)


def section(
    found: Sequence[Point], baseline: Baseline, laws: Sequence[Fits], references: Mapping[str, float], pictures: str, measures: Measures
) -> str:
    """The pictures, the exponents with their intervals, the points, and what could not be fitted, as HTML for the body of a page."""
    gain, loss = measures.gain, measures.loss
    bound = references.get(gain.key)
    known = (
        "" if bound is None else f" The best {gain.name} that is possible is {bound:.4f}, {bound - baseline.mean:+.4f} over the baseline."
    )
    parts = [
        f"<p>Gains are over <b>{html.escape(baseline.name)}</b>, whose {gain.name} is {baseline.mean:.4f}.{known} Whiskers are a standard "
        "deviation over seeds; bands and brackets are intervals from resampling seeds.</p>",
        pictures,
    ]
    for law in laws:
        parts.append(f"<h3>Laws in {html.escape(measures.x[law.x])}</h3>")
        head = ("architecture", f"{gain.name} gain over {baseline.name} ∝ P^a: a", f"{loss.name} = L∞ + c·P^a: a", "L∞")
        rows = [
            (name, _interval(law.gain.get(name)), _interval(law.loss.get(name)), _interval(law.loss.get(name), "floor"))
            for name in dict.fromkeys(point.architecture for point in found)
        ]
        parts.append(_table(head, rows))
        if law.refused:
            parts.append(f"<ul>{''.join(f'<li>{html.escape(reason)}</li>' for reason in law.refused)}</ul>")
    columns = ("architecture", "size", *measures.x.values(), "seeds", gain.name, "gain", loss.name, *(m.name for m in measures.slices))
    rows_of_points = [
        (
            point.architecture,
            point.size,
            *(f"{int(point.x[x]):,}" for x in measures.x),
            str(len(point.metrics[gain.key])),
            _spread(point, gain),
            f"{point.mean(gain.key) - baseline.mean:+.4f}",
            _spread(point, loss),
            *(_spread(point, measure) for measure in measures.slices),
        )
        for point in found
    ]
    parts += ["<h3>Points</h3>", _table(columns, rows_of_points)]
    if references:
        values = [(name, f"{value:.5f}") for name, value in references.items()]
        parts += ["<h3>What is known of the data</h3>", _table(("value", ""), values)]
    return "\n".join(parts)


def _spread(point: Point, measure: Measure) -> str:
    if measure.key not in point.metrics:
        return "–"
    return f"{point.mean(measure.key):.4f} ± {point.spread(measure.key):.4f}"


def _interval(law: Law | None, name: str = "exponent") -> str:
    if law is None:
        return "–"
    interval: Interval = getattr(law, name)
    shown = f"{interval.estimate:.4f}"
    return shown if np.isnan(interval.low) else f"{shown} [{interval.low:.4f}, {interval.high:.4f}]"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
