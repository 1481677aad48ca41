# SPDX-License-Identifier: Apache-2.0
"""How figures look, and figures as SVG to stand inside a page: the run's report and the scaling studies draw with the same hand."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
COLOURS = ("#2563eb", "#d97706", "#15803d", "#b91c1c", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")  # of curves, one after another
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "recsys",
}


def svg(draw: Callable[[Sequence[Axes]], None], *, columns: int, size: tuple[float, float], sharey: bool = False) -> str:
    """A row of panels as an ``<svg>`` element that is as wide as its page allows. Nothing of the day or the process is in it.

    Args:
        draw: draws into the panels.
        columns: how many panels.
        size: width and height in inches.
        sharey: whether the panels share their vertical axis.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained")
        try:
            draw(list(axes[0]))
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        finally:
            plt.close(figure)
    text = buffer.getvalue()
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', 'style="max-width:100%;height:auto" role="img"', text[text.index("<svg") :], count=1
    )
