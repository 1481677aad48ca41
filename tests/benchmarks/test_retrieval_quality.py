# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.retrieval_quality import grid as grid_module
from benchmarks.retrieval_quality import plans
from benchmarks.retrieval_quality.data import Dataset
from benchmarks.retrieval_quality.grid import EVERY, Grid, read_ranks
from benchmarks.retrieval_quality.items import items_of
from benchmarks.retrieval_quality.plans import Plan
from benchmarks.retrieval_quality.summary import markdown, scored, tables
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData
from recsys.evaluation.metrics.ranking import recall_at
from recsys.evaluation.tuned_baselines import DECAYS

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
    return Dataset("drawn", "0", events, tuple(f"item {i}" for i in range(ITEMS)), cache=tmp_path)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    model = {"dim": 16, "blocks": 1, "heads": 1, "max_length": 8}
    windows, training = {"stride": 8}, plans.training(16, 12, 0.01, 3)
    fsq = {"tokenizer": {"name": "fsq", "slots": 4, "levels": [5, 5], "epochs": 5, "heads": 2}, "repair": "keep"}
    kmeans = {"tokenizer": {"name": "residual_kmeans", "levels": 2, "codes": 4}, "repair": "suffix", "suffix_size": 16}
    semantic = {"text": "hashing", "collaborative": "sasrec", "betas": (0.0, 0.5, 1.0), "validation": 30}
    setrec = model | {"warm_start": True, "semantic_tokens": 2, "ae_hidden": [16]}
    tiger = {"dim": 16, "layers": 1, "heads": 2, "head_dim": 8, "ffn": 32, "max_length": 8}
    small = {
        "sasrec": Plan(model, ({"model.dropout": 0.2}, {"model.dropout": 0.5}), windows, training),
        "setrec": Plan(setrec, ({},), windows, training, **semantic),
        "setrec_fsq": Plan(model | {"semantic": "codes", "code_digits": [5, 5]}, ({},), windows, training, codes=fsq, **semantic),
        "rpg": Plan(model, ({"training.trainer.optimizer.learning_rate": 0.02},), windows, training, text="hashing", codes=fsq),
        "tiger": Plan(tiger, ({},), windows, training, text="hashing", codes=kmeans, index={"name": "beam", "width": 5}),
    }
    monkeypatch.setattr(grid_module, "PLANS", small)
    return Grid(tmp_path / "raw.jsonl", tmp_path / "cache")


def test_cells_are_filled_once_and_the_best_point_is_tested(data: Dataset, grid: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    grid.fill(data, "sasrec", [0, 1])
    records = grid.records()
    assert [(r["stage"], r["seed"]) for r in records] == [("tune", 0), ("tune", 0), ("final", 0), ("final", 1)]
    best = max(records[:2], key=lambda r: r["valid"]["ndcg@10"])
    assert all(r["config"] == best["config"] and set(r["test"]) == set(EVERY) for r in records[2:])
    assert not any("test" in r for r in records[:2]) and records[2]["valid"] == best["valid"]
    for record in records[2:]:
        ranks = read_ranks(grid.ranks(record["cell"]))
        assert len(ranks) == len(data.split.test) and record["test"]["recall@5"] == pytest.approx(recall_at(ranks, 5).mean())
        assert record["test"]["recall@5"] > 0.8
    assert "drawn sasrec final seed 1: test recall@5" in capsys.readouterr().out
    before = grid.raw.read_text()
    grid.fill(data, "sasrec", [0, 1])
    assert grid.raw.read_text() == before
    grid.ranks(records[3]["cell"]).unlink()
    grid.fill(data, "sasrec", [0, 1])
    assert [r["seed"] for r in grid.records()] == [0, 0, 0, 1] and len(grid.raw.read_text().splitlines()) == 5


def test_tables_compare_with_sasrec_on_every_slice(data: Dataset, grid: Grid) -> None:
    for model in ("popularity", "repeat_last", "item_knn", "sasrec"):
        grid.fill(data, model, [0])
    rows, checks = tables(grid, {"drawn": data})
    assert {row["model"] for row in rows} == {"popularity", "repeat_last", "item_knn", "sasrec"} and not checks
    whole = {row["model"]: row for row in rows if row["slice"] == "all"}
    assert whole["sasrec"]["ndcg@10 less sasrec"] == "" and whole["popularity"]["ndcg@10 less sasrec"].startswith("-")
    assert float(whole["repeat_last"]["recall@5"]) == 0.0, "what was seen is left out"
    text = markdown(rows)
    assert text.splitlines()[1].count("---") == len(rows[0]) and len(text.splitlines()) == len(rows) + 2
    assert json.loads(grid.raw.read_text().splitlines()[2])["chosen"]["decay"] in DECAYS
    assert len(scored(grid)) == 4


def test_models_read_text_codes_and_the_collaborative_model_of_their_seed(data: Dataset, grid: Grid) -> None:
    for model in ("setrec", "setrec_fsq", "rpg", "tiger"):
        records = grid.fill(data, model, [0, 1])
        assert [r["model"] for r in records] == [model] * 2 and all(r["test"]["recall@10"] > 0.6 for r in records), model
    every = grid.records()
    sasrec = {r["seed"]: r["cell"] for r in every if r["model"] == "sasrec" and r["stage"] == "final"}
    for record in (r for r in every if r["model"].startswith("setrec")):
        assert record["config"]["items"]["collaborative"] == sasrec[record["seed"]]
        best = max(record["betas"], key=record["betas"].get)
        assert record["chosen"] == {"beta": float(best)} and record["valid"]["ndcg@10"] == pytest.approx(record["betas"][best], abs=1e-5)
    assert {key: len(one.records) for key, one in scored(grid).items()} == {
        ("drawn", m): 2 for m in ("sasrec", "setrec", "setrec_fsq", "rpg", "tiger")
    }
    before = grid.raw.read_text()
    grid.fill(data, "setrec_fsq", [0, 1])
    assert grid.raw.read_text() == before


def test_ranks_beyond_the_places_are_kept_as_misses(tmp_path: Path) -> None:
    grid_module.write_ranks(tmp_path / "a" / "b.npz", np.array([1.0, 7.5, 100.0, 100.5, np.inf]))
    assert read_ranks(tmp_path / "a" / "b.npz").tolist() == [1.0, 7.5, 100.0, np.inf, np.inf]


def test_items_that_are_held_out_are_unknown_until_the_test(data: Dataset, grid: Grid) -> None:
    held = replace(data, held_out=0.2)
    events = np.bincount(held.split.train.items, minlength=ITEMS)
    cold = np.flatnonzero(events == 0)
    assert len(cold) == 3 and not held.warm[torch.from_numpy(cold)].any()
    assert not np.isin(held.split.valid.targets.values, cold).any() and np.isin(held.split.test.targets.values, cold).any()
    items = items_of(held, {"text": "hashing", "codes": grid_module.PLANS["rpg"].codes}, None)
    assert items.warm.sum() == ITEMS - 3 and items.codes is not None and len(items.codes) == ITEMS
    few = items_of(replace(held, held_out=0.0), {"text": "hashing", "codes": grid_module.PLANS["rpg"].codes}, None)
    assert few.codes is not None and few.codes.tokenizer != items.codes.tokenizer, "the tokenizer is fitted on the items of training"
    grid.fill(held, "rpg", [0])
    rows, _ = tables(grid, {"drawn": held})
    assert {row["slice"]: row["targets"] for row in rows}["cold"] == int(np.isin(held.split.test.targets.values, cold).sum())


def test_other_columns_of_text_are_other_cells(data: Dataset, grid: Grid) -> None:
    one = grid.fill(data, "rpg", [0])[0]["cell"]
    assert grid.fill(replace(data, columns=("title",)), "rpg", [0])[0]["cell"] != one
    assert grid.fill(replace(data, columns=("title",)), "popularity", [0])[0]["cell"] == grid.fill(data, "popularity", [0])[0]["cell"]
