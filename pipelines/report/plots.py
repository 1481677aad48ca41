# SPDX-License-Identifier: Apache-2.0
"""The report's pictures, as SVG text that stands inside the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from recsys.evaluation.figure import GRID, INK, MUTED, svg

OURS, BASELINE, ACCENT = "#2563eb", "#9aa5b1", "#d97706"


def bars(models: Mapping[str, Mapping[str, float]], metrics: Sequence[str], ours: Sequence[str], labels: Mapping[str, str]) -> str:
    """A small panel of horizontal bars for each metric, one bar per model; our models in colour."""

    def draw(axes: Sequence[Axes]) -> None:
        names = list(models)
        for axis, metric in zip(axes, metrics, strict=True):
            values = [models[name].get(metric, 0.0) for name in names]
            colours = [OURS if name in ours else BASELINE for name in names]
            axis.barh(range(len(names)), values, color=colours, height=0.62)
            axis.set_title(metric)
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set_xlim(0, max([*values, 1e-9]) * 1.25)
            axis.set_yticks(range(len(names)), [labels.get(n, n) for n in names] if axis is axes[0] else [""] * len(names))
            for place, value in enumerate(values):
                axis.text(value, place, f" {value:.3f}", va="center", color=INK, fontsize=8)

    return svg(draw, columns=len(metrics), size=(2.6 * len(metrics) + 1, 0.42 * len(models) + 0.8))


def curves(panels: Sequence[tuple[str, Mapping[str, Sequence[tuple[float, float]]]]]) -> str:
    """Learning curves: one panel per title, one line per name, points ``(epoch, value)``; the best validation epoch is marked."""

    def draw(axes: Sequence[Axes]) -> None:
        for axis, (title, lines) in zip(axes, panels, strict=True):
            axis.set_title(title)
            axis.set_xlabel("epoch")
            for (name, points), colour in zip(lines.items(), (OURS, ACCENT, BASELINE), strict=False):
                axis.plot(
                    [x for x, _ in points], [y for _, y in points], color=colour, label=name, linewidth=1.6, marker="o", markersize=2.5
                )
            if len(lines) > 1:
                axis.legend(frameon=False, fontsize=8)

    return svg(draw, columns=len(panels), size=(3.1 * len(panels), 2.5))


def calibration(models: Mapping[str, Sequence[Mapping[str, float]]], labels: Mapping[str, str], ours: Sequence[str]) -> str:
    """Predicted against observed rates in bins of equal counts, beside the diagonal."""

    def draw(axes: Sequence[Axes]) -> None:
        (axis,) = axes
        axis.plot([0, 1], [0, 1], color=GRID, linewidth=1.5)
        for name, bins in models.items():
            colour = OURS if name in ours else BASELINE
            xs, ys = [b["predicted"] for b in bins], [b["observed"] for b in bins]
            axis.plot(xs, ys, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=labels.get(name, name))
        axis.set(xlabel="predicted probability", ylabel="observed rate", xlim=(0, 1), ylim=(0, 1), title="Calibration")
        axis.legend(frameon=False, fontsize=8)

    return svg(draw, columns=1, size=(3.6, 3.2))


def intervals(rows: Sequence[Mapping[str, Any]]) -> str:
    """Differences with their 95% intervals against zero: dots with whiskers, green right of zero, amber across it."""

    def draw(axes: Sequence[Axes]) -> None:
        (axis,) = axes
        axis.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            colour = "#15803d" if row["low"] > 0 else ("#b91c1c" if row["high"] < 0 else ACCENT)
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2)
            axis.plot(row["estimate"], place, "o", color=colour, markersize=5)
        axis.set_yticks(range(len(rows)), [row["name"].replace("_", " ") for row in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_title("Difference, with its 95% interval over users")

    return svg(draw, columns=1, size=(7.2, 0.3 * len(rows) + 0.8))


def deletion(effects: Mapping[str, Mapping[str, float]]) -> str:
    """By how much the score falls when an event of the history is removed, for each way of choosing the event."""

    def draw(axes: Sequence[Axes]) -> None:
        (axis,) = axes
        names = list(effects)
        for place, name in enumerate(names):
            row = effects[name]
            axis.barh(place, row["estimate"], color=OURS if name == "top" else BASELINE, height=0.6)
            axis.plot([row["low"], row["high"]], [place, place], color=INK, linewidth=1.2)
        axis.set_yticks(range(len(names)), [f"{name} event" for name in names])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_title("Fall of the score when one event is removed")

    return svg(draw, columns=1, size=(4.6, 1.9))
