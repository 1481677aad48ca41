# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.retrieval_quality import grid as grid_module
from benchmarks.retrieval_quality.data import Dataset
from benchmarks.retrieval_quality.grid import EVERY, Grid, Plan
from benchmarks.retrieval_quality.summary import markdown, scored, tables
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData
from recsys.evaluation.metrics.ranking import recall_at

ITEMS, USERS = 15, 60


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Users who walk up the catalogue, from a random place."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 7, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    start = np.repeat(rng.integers(0, ITEMS, USERS), lengths)
    items = (start + np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)) % ITEMS
    events = SequenceData.from_order([f"u{i}" for i in range(USERS)], Jagged(items, offsets))
    return Dataset("drawn", "0", events, tuple(f"item {i}" for i in range(ITEMS)), tmp_path)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    plan = grid_module.PLANS["sasrec"]
    model = {"dim": 16, "blocks": 1, "heads": 1, "max_length": 8}
    training = grid_module._training(16, 12, 0.01, 3)
    monkeypatch.setattr(grid_module, "PLANS", {"sasrec": Plan(model, plan.points, {"stride": 8}, training)})
    return Grid(tmp_path / "raw.jsonl", tmp_path / "cache")


def test_cells_are_filled_once_and_the_best_point_is_tested(data: Dataset, grid: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    grid.fill(data, "sasrec", 2)
    records = grid.records()
    assert [(r["stage"], r["seed"]) for r in records] == [("tune", 0), ("tune", 0), ("final", 0), ("final", 1)]
    best = max(records[:2], key=lambda r: r["valid"]["ndcg@10"])
    assert all(r["config"] == best["config"] and set(r["test"]) == set(EVERY) for r in records[2:])
    assert not any("test" in r for r in records[:2]) and records[2]["valid"] == best["valid"]
    for record in records[2:]:
        ranks = np.load(grid.ranks(record["cell"]))
        assert len(ranks) == len(data.split.test) and record["test"]["recall@5"] == pytest.approx(recall_at(ranks, 5).mean())
        assert record["test"]["recall@5"] > 0.8
    assert "drawn sasrec final seed 1: test recall@5" in capsys.readouterr().out
    before = grid.raw.read_text()
    grid.fill(data, "sasrec", 2)
    assert grid.raw.read_text() == before
    grid.ranks(records[3]["cell"]).unlink()
    grid.fill(data, "sasrec", 2)
    assert [r["seed"] for r in grid.records()] == [0, 0, 0, 1, 1]


def test_tables_compare_with_sasrec_on_every_slice(data: Dataset, grid: Grid) -> None:
    for model in ("popularity", "repeat_last", "item_knn", "sasrec"):
        grid.fill(data, model, 1)
    rows, checks = tables(grid, {"drawn": data})
    assert {row["model"] for row in rows} == {"popularity", "repeat_last", "item_knn", "sasrec"} and not checks
    whole = {row["model"]: row for row in rows if row["slice"] == "all"}
    assert whole["sasrec"]["ndcg@10 less sasrec"] == "" and whole["popularity"]["ndcg@10 less sasrec"].startswith("-")
    assert float(whole["repeat_last"]["recall@5"]) == 0.0, "what was seen is left out"
    text = markdown(rows)
    assert text.splitlines()[1].count("---") == len(rows[0]) and len(text.splitlines()) == len(rows) + 2
    assert json.loads(grid.raw.read_text().splitlines()[2])["chosen"]["decay"] in grid_module._DECAYS
    assert len(scored(grid)) == 4
