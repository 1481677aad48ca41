# SPDX-License-Identifier: Apache-2.0
"""From lines to points, laws, the table, the picture and the section of a page."""

import csv
import io
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from recsys.scaling.plot import Baseline, Point, figure, fits, points, section, slices, table
from recsys.scaling.rankers import Rankers
from recsys.scaling.subject import Measure, Measures

BOUND = 0.80
AUC = Rankers.measures


def rows(
    architectures: tuple[str, ...] = ("<mixer>", "flat"), sizes: tuple[int, ...] = (1000, 4000, 16_000, 64_000)
) -> list[dict[str, Any]]:
    """Lines of cells whose gain over 0.7 is ``0.02 · (P/1000)^a``, whose seeds differ by ± 0.0002."""
    return [
        {
            "architecture": name,
            "size": f"{size // 1000}k",
            "rows": 500,
            "seed": seed,
            "params": {"tables": 7, "dense": size, "active": size},
            "flops": 2 * size,
            "metrics": {
                "auc": 0.7 + 0.02 * (size / 1000) ** (0.1 + 0.1 * i) + 0.0002 * (seed - 1),
                "log_loss": 0.4 + 0.1 * (size / 1000) ** -0.3 + 0.0002 * (seed - 1),
                "ne": 0.9,
            },
        }
        for i, name in enumerate(architectures)
        for size in sizes
        for seed in (0, 1, 2)
    ]


def test_seeds_are_one_point() -> None:
    found = points(rows(), AUC)
    assert len(found) == 8 and all(len(point.metrics["auc"]) == 3 for point in found)
    first = found[0]
    assert (first.architecture, first.size, dict(first.x)) == ("<mixer>", "1k", {"params": 1000, "flops": 2000, "rows": 500})
    assert first.mean("auc") == pytest.approx(0.72) and first.spread("auc") == pytest.approx(0.0002)
    assert Point("a", "b", {}, {"auc": [0.7]}).spread("auc") == 0


def test_laws_are_fitted_for_each_architecture_and_x() -> None:
    found = points(rows(), AUC)
    by_params, by_flops = (fits(found, Baseline("r", [0.7]), x, AUC, resamples=50, level=0.9) for x in ("params", "flops"))
    for name, exponent in (("<mixer>", 0.1), ("flat", 0.2)):
        for laws in (by_params, by_flops):
            assert laws.gain[name].exponent.estimate == pytest.approx(exponent, abs=1e-6)
            assert laws.loss[name].exponent.estimate == pytest.approx(-0.3, abs=2e-3)
        # P = FLOPs / 2 changes the coefficient alone.
        ratio = by_flops.gain[name].coefficient.estimate / by_params.gain[name].coefficient.estimate
        assert ratio == pytest.approx(2**-exponent)
    assert not by_params.refused


def test_a_fit_that_is_refused_says_why_and_others_go_on() -> None:
    found = points(rows(sizes=(1000, 4000)), AUC)
    laws = fits(found, Baseline("r", [0.71, 0.7205]), "params", AUC, resamples=20, level=0.9)
    assert set(laws.gain) <= {"<mixer>", "flat"} and not laws.loss
    assert "flat: sizes: expected at least 3 different ones, got 2" in laws.refused


def test_the_baseline_s_own_point_is_left_out_of_its_law() -> None:
    found = points(rows(), AUC)
    laws = fits(found, Baseline("flat 1k", found[4].metrics["auc"], found[4]), "params", AUC, resamples=0, level=0.9)
    assert laws.gain["flat"].sizes == 3 and laws.loss["flat"].sizes == 4
    assert laws.refused and laws.refused[0].startswith("<mixer>: gain: a power law needs a gain over the baseline")


def test_the_table_holds_every_point() -> None:
    found = points(rows(), AUC)
    lines = list(csv.DictReader(io.StringIO(table(found, Baseline("r", [0.7]), AUC))))
    assert len(lines) == len(found)
    for line, point in zip(lines, found, strict=True):
        assert (line["architecture"], line["size"], line["seeds"]) == (point.architecture, point.size, "3")
        assert int(line["params"]) == point.x["params"] and int(line["flops"]) == point.x["flops"]
        assert float(line["gain"]) == pytest.approx(float(line["auc"]) - 0.7, abs=1e-6)


def drawn() -> tuple[str, list[Any]]:
    found, baseline = points(rows(), AUC), Baseline("r", [0.7])
    laws = [fits(found, baseline, x, AUC, resamples=50, level=0.9) for x in ("params", "flops")]
    return figure(found, baseline, laws, BOUND, AUC), laws


def test_the_picture_is_svg_with_every_curve_and_the_bound() -> None:
    svg, _ = drawn()
    ET.fromstring(svg)  # well-formed
    text = "".join(ET.fromstring(svg).itertext())
    for shown in ("<mixer>", "flat", "Bayes bound", "dense parameters", "FLOPs per sample, forward", "AUC over r"):
        assert shown in text
    assert drawn()[0] == svg  # nothing of the day or the process in it
    found, baseline = points(rows(), AUC), Baseline("r", [0.7])
    assert "Bayes" not in figure(found, baseline, [fits(found, baseline, "params", AUC, resamples=0, level=0.9)], None, AUC)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_section_shows_exponents_and_escapes_names() -> None:
    svg, laws = drawn()
    found, baseline = points(rows(), AUC), Baseline("r & co", [0.7])
    page = section(found, baseline, laws, {"auc": BOUND}, svg, AUC)
    reader = _Tags()
    reader.feed(page.replace(svg, ""))
    assert reader.open == []
    law = laws[0].gain["flat"]
    assert f"{law.exponent.estimate:.4f} [{law.exponent.low:.4f}, {law.exponent.high:.4f}]" in reader.text
    assert "r & co" in reader.text and "+0.1000 over the baseline" in reader.text and "<mixer>" in reader.text
    assert "<mixer>" not in page.replace(svg, "") and np.isfinite(law.draws).all()


def test_slices_are_drawn_and_tabled_where_they_are_known() -> None:
    warm, cold = Measure("ndcg.warm", "NDCG, warm"), Measure("ndcg.cold", "NDCG, cold")
    measures = Measures(Measure("auc", "NDCG"), Measure("log_loss", "CE"), (warm, cold), (warm, cold), {**AUC.x, "rows": "training users"})
    lines = [line | {"metrics": line["metrics"] | {"ndcg.warm": 0.5}} for line in rows()]
    for line in lines[:-1]:
        line["metrics"]["ndcg.cold"] = 0.25
    found, baseline = points(lines, measures), Baseline("popularity", [0.7])
    assert [("ndcg.cold" in point.metrics) for point in found] == [True] * 7 + [False]  # one seed of the last point has none
    text = "".join(ET.fromstring(slices(found, "rows", measures)).itertext())
    assert "NDCG, warm" in text and "NDCG, cold" in text and "training users" in text and "<mixer>" in text
    cells = list(csv.DictReader(io.StringIO(table(found, baseline, measures))))
    assert [line["ndcg.cold"] for line in cells] == ["0.250000"] * 7 + [""] and {line["ndcg.warm"] for line in cells} == {"0.500000"}
    laws = [fits(found, baseline, "params", measures, resamples=0, level=0.9)]
    page = section(found, baseline, laws, {}, "", measures)
    assert "NDCG gain over popularity ∝ P^a: a" in page and "0.2500 ± 0.0000" in page and page.count("<td>–</td>") == 1
