# SPDX-License-Identifier: Apache-2.0
"""From a run's results, plain data, to the page."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipelines.report import plots
from recsys.core.files import write_bytes

LABELS = {
    "tokenmixer_large": "TokenMixer-Large",
    "logistic_regression": "logistic regression",
    "base_rate": "base rate",
    "setrec": "SETRec",
    "sasrec": "SASRec",
    "item_knn": "item-kNN",
    "text_knn": "text-kNN",
    "repeat_last": "repeat last",
    "popularity": "popularity",
    "final": "final list (retrieve, then rank)",
    "retriever": "retriever's own list",
    "all": "all users",
    "established": "users with at least 5 earlier events",
    "new": "users first seen in the test period",
}
SLICES = {
    "new": "new to the user",
    "repeated": "repeated",
    "warm": "warm items",
    "cold": "cold items",
    "head": "head items",
    "tail": "tail items",
    "cold_user": "users with 1–3 events",
    "empty_user": "users with none",
}
OURS = ("tokenmixer_large", "setrec", "final")


def render(results: Mapping[str, Any]) -> str:
    """The report of a run as one HTML page with everything inside it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["label"] = lambda name: LABELS.get(name, name)
    environment.filters["slice"] = lambda name: SLICES.get(name, name)
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4f}"
    template = environment.from_string(resources.files("pipelines.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(**results, pictures=_pictures(results), ours=OURS)


def write_report(path: Path, results: Mapping[str, Any]) -> None:
    """Write the report whole or not at all."""
    write_bytes(path, render(results).encode())


def _pictures(results: Mapping[str, Any]) -> dict[str, str]:
    ranking, retrieval = results["ranking"], results["retrieval"]
    overall = {name: segments["all"] for name, segments in retrieval["models"].items()}
    panels = [
        (f"{LABELS.get(name, name)}: {metric}", {metric: [(e["epoch"], e[metric]) for e in history if e.get(metric) is not None]})
        for name, history in results["curves"].items()
        for metric in ("train_loss", results["monitors"][name])
    ]
    return {
        "calibration": plots.calibration(ranking["calibration"], LABELS, OURS),
        "retrieval": plots.bars(overall, ("recall@10", "recall@50", "ndcg@10"), OURS, LABELS),
        "curves": plots.curves(panels),
        "intervals": plots.intervals([v for v in results["verdicts"] if not v["name"].endswith(".fall")]),
        "deletion": plots.deletion(results["explanations"]["effects"]),
    }
