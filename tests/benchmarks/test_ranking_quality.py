# SPDX-License-Identifier: Apache-2.0
"""The quality comparison: encoded rows, presets, the runner that goes on, the peers' loop, and what the summary concludes."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from benchmarks.frame import Result
from benchmarks.ranking_quality import data as quality_data
from benchmarks.ranking_quality import grid as quality_grid
from benchmarks.ranking_quality.data import Encoded, Part, encode, load, padded
from benchmarks.ranking_quality.grid import HEADLINE, OTHERS, PEERS, PLAN, POINTS, SIZES, Grid, Job, model_config, peer_request, select
from benchmarks.ranking_quality.peers_common import Inputs, Peer, predict, sizes, train
from benchmarks.ranking_quality.summary import Comparison, markdown
from benchmarks.ranking_quality.train import Budget, Outcome, peer_inputs, train_ours
from recsys.core import components
from recsys.data.datasets.frappe import FIELDS, FRAPPE
from recsys.data.datasets.impressions import Impressions, ImpressionSource
from recsys.data.datasets.movielens_impressions import HISTORY, encoder
from recsys.data.encode import Encoder
from recsys.training.optim import DenseOptimizer

TINY = Budget(epochs=2, patience=1, batch_size=64)


def movielens(rows: int = 200) -> Impressions:
    """Random impressions with MovieLens's columns; a quarter have no history."""
    random = np.random.default_rng(0)

    def draw(name: str, values: int) -> pl.Series:
        return pl.Series(name, random.integers(values, size=rows).astype(str))

    histories = [random.integers(20, size=n * (n % 4 > 0)).astype(str).tolist() for n in random.integers(0, 9, rows)]
    table = pl.DataFrame(
        [
            *(draw(name, 9) for name in ("user_id", "gender", "age", "occupation", "zip")),
            draw("item_id", 20),
            pl.Series("genres", [["Drama", "War"][: 1 + i % 2] for i in range(rows)]),
            pl.Series("year", random.integers(1950, 2000, rows).astype(float)),
            pl.Series("history_item", histories, dtype=pl.List(pl.String)),
            pl.Series("history_rating", [[None if i % 3 else 4.0 for i in range(len(h))] for h in histories], dtype=pl.List(pl.Float64)),
            pl.Series("label", (random.random(rows) < 0.5).astype(np.float32)),
        ]
    ).to_arrow()
    parts = {"train": table.slice(0, 120), "valid": table.slice(120, 40), "test": table.slice(160)}
    return Impressions("movielens_1m", parts, encoder(HISTORY))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache over a planted Frappe of 600 rows, of which the label follows user and item, and over random MovieLens rows."""
    random = np.random.default_rng(1)
    frame = pl.DataFrame({name: random.integers(6, size=600).astype(np.int32) for name in FIELDS})
    likes = (pl.col("user_id") + pl.col("item_id")) % 2
    split = pl.Series("split", np.repeat(["train", "valid", "test"], [400, 100, 100]))
    (tmp_path / "frappe").mkdir()
    frame.with_columns(label=likes.cast(pl.Int8), split=split).write_parquet(tmp_path / "frappe" / "ctr.parquet")
    monkeypatch.setenv("RECSYS_DATA", str(tmp_path))
    source = ImpressionSource(lambda: "planted", movielens)
    monkeypatch.setitem(quality_data.SOURCES, "movielens_1m", source)
    return tmp_path / "cache"


def test_batches_of_the_cache_equal_the_encoders(cache: Path) -> None:
    for name, impressions in (("frappe", FRAPPE.load()), ("movielens_1m", movielens())):
        encoder = Encoder.fit(impressions.encoder, impressions.parts["train"])
        for loaded in (load(name, cache), load(name, cache)):  # written, then read
            assert loaded.spec == encoder.spec and loaded.spec.groups == impressions.encoder.groups
            for part, table in impressions.parts.items():
                rows = np.random.default_rng(2).permutation(table.num_rows)[:50]
                ours, theirs = loaded.batch(part, rows), encoder.transform(table.take(rows))
                for mine, expected in ((ours.sparse, theirs.sparse), (ours.sequences, theirs.sequences)):
                    assert mine.keys() == expected.keys()
                    assert torch.equal(mine.values(), expected.values()) and torch.equal(mine.lengths(), expected.lengths())
                assert torch.equal(ours.labels, theirs.labels)


def test_users_are_the_same_in_every_part(cache: Path) -> None:
    loaded, parts = load("movielens_1m", cache), movielens().parts
    names = {}
    for part, table in parts.items():
        for user, code in zip(table["user_id"].to_pylist(), loaded.parts[part].users.tolist(), strict=True):
            assert names.setdefault(code, user) == user
    assert len(set(names.values())) == len(names)


def test_another_version_of_the_rows_is_encoded_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load("frappe", cache).fingerprint
    monkeypatch.setitem(quality_data.VERSIONS, "frappe", quality_data.VERSIONS["frappe"] + 1)
    assert load("frappe", cache).fingerprint != before


def test_flat_rows_hold_the_history_as_a_bag_beside_the_candidate(cache: Path) -> None:
    whole, flat = load("movielens_1m", cache), load("movielens_1m/flat", cache)
    assert not flat.spec.sequences and "history_rating" not in flat.spec.bag_keys
    assert next(t for t in flat.spec.tables if t.name == "item_id").bags == ("history_item", "item_id")
    rows = np.arange(30)
    for key in ("history_item", "item_id"):
        a, b = whole.batch("train", rows).sequences[key], flat.batch("train", rows).sparse[key]
        assert torch.equal(a.values(), b.values()) and torch.equal(a.lengths(), b.lengths())
    assert sorted(f for fields in flat.spec.groups.values() for f in fields) == sorted(flat.spec.fields)


def test_padded_lists() -> None:
    part = Part({"k": (np.array([5, 6, 7]), np.array([0, 2, 2, 3]))}, np.zeros(3, np.float32), np.zeros(3, np.int64))
    assert padded(part, "k").tolist() == [[5, 6], [0, 0], [7, 0]]


def test_dense_columns_are_refused() -> None:
    impressions = movielens()
    config = Encoder.Config.model_validate(
        {"features": [{"kind": "dense", "feature": "year"}], "tasks": [{"name": "x", "feature": "label"}]}
    )
    with pytest.raises(ValueError, match="dense"):
        encode(Impressions("x", impressions.parts, config))


@pytest.mark.parametrize("name", ["frappe", "movielens_1m"])
def test_every_preset_builds_and_the_headline_is_of_one_size(cache: Path, name: str) -> None:
    loaded, dense = load(name, cache), {}
    for model in (m for m in SIZES if m in components.names("ranker")):
        config = model_config(model, loaded, POINTS["frappe"][0], anneal_steps=10)
        assert '"dropout":0.2' in config.model_dump_json() or model == "dlrm"
        dense[model] = components.build("ranker", config, loaded.spec).costs().dense
    middle = float(np.median([dense[model] for model in HEADLINE if model in dense]))
    assert all(0.85 < dense[model] / middle < 1.15 for model in HEADLINE if model in dense)
    assert all(0.7 < size / middle < 1.3 for size in dense.values())


def test_the_recorded_configuration_holds_the_groups(cache: Path) -> None:
    loaded, (folder,) = load("frappe", cache), cache.iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert {name: tuple(fields) for name, fields in meta["groups"].items()} == loaded.spec.groups and "groups" not in meta["spec"]
    plain = model_config("rankmixer", loaded, POINTS["frappe"][0], anneal_steps=10).model_dump(mode="json")
    assert plain["tokenizer"]["groups"] == meta["groups"]


def test_the_plan_is_the_issues() -> None:
    jobs = {(job.data, job.model): job.seeds for job in PLAN}
    assert all(jobs[data, model] == 3 for data in ("frappe", "movielens_1m", "movielens_100k") for model in HEADLINE)
    assert all(jobs["frappe", model] >= 1 for model in OTHERS) and len(jobs) == len(PLAN)
    assert all((data, model) in jobs for data in ("frappe", "movielens_1m/flat") for model in ("dcnv2", *PEERS))
    assert all(len(points) <= 6 for points in POINTS.values()) and {job.model for job in PLAN} <= {*SIZES, *PEERS}
    assert select(PLAN, "frappe", "dcnv2,rankmixer", 1) == [Job("frappe", "dcnv2", 1), Job("frappe", "rankmixer", 1)]


def test_training_ours_learns_what_is_planted(cache: Path) -> None:
    loaded = load("frappe", cache)
    config = model_config("dcnv2", loaded, POINTS["frappe"][-1], anneal_steps=10)
    outcome = train_ours(config, DenseOptimizer(name="adam", learning_rate=0.01), loaded, Budget(20, 20, 64), 0)
    assert outcome.test.dtype == np.float32
    assert roc_auc_score(loaded.parts["test"].labels, outcome.test) > 0.9
    assert outcome.best == int(np.argmax([v["auc"] for v in outcome.valid])) and outcome.dense_parameters > 0


def fake_outcome(data: Encoded, auc: float, seed: int) -> Outcome:
    scores = np.random.default_rng(seed).random(len(data.parts["test"])).astype(np.float32)
    return Outcome([{"auc": auc - 0.1, "logloss": 1.0}, {"auc": auc, "logloss": 0.5}], 10, 20, scores, 1.0)


def test_the_runner_tunes_on_validation_and_goes_on_where_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[float, int]] = []

    def fake(config: Any, optimizer: DenseOptimizer, data: Encoded, budget: Budget, seed: int) -> Outcome:
        if len(trained) == 3:
            trained.append((-1, -1))
            raise RuntimeError("killed")
        trained.append((optimizer.learning_rate, seed))
        return fake_outcome(data, 0.9 if optimizer.learning_rate == 0.003 else 0.8, seed)

    monkeypatch.setattr(quality_grid, "train_ours", fake)
    points = (POINTS["frappe"][0], POINTS["frappe"][2])
    raw = cache / "raw.jsonl"
    Grid(raw, points, TINY, cache=cache).fill([Job("frappe", "dcnv2", 3)])
    assert len(Grid(raw, cache=cache).records()) == 4  # two points, two seeds of the better one; then it was killed
    grid = Grid(raw, points, TINY, cache=cache)
    grid.fill([Job("frappe", "dcnv2", 3)])
    rates = [(0.001, 0), (0.003, 0), (0.003, 1), (-1, -1), (0.003, 2)]  # seed 0 of the better point is its tuning cell
    assert trained == rates
    records = grid.records()
    assert [r["stage"] for r in records] == ["tune"] * 2 + ["final"] * 3 and all("test" not in r for r in records[:2])
    grid.fill([Job("frappe", "dcnv2", 3)])
    assert trained == rates
    labels = load("frappe", cache).parts["test"].labels
    for record in records[2:]:
        predicted = np.load(grid.predictions(record["cell"])).astype(np.float64)
        assert record["test"]["auc"] == pytest.approx(roc_auc_score(labels, predicted))
        assert record["test"]["logloss"] == pytest.approx(log_loss(labels, predicted))


def test_peers_get_the_same_rows(cache: Path) -> None:
    flat = load("movielens_1m/flat", cache)
    arrays, fields = peer_inputs(flat)
    assert [field["name"] for field in fields] == list(flat.spec.bag_keys)
    for field in fields:
        for part in ("train", "valid", "test"):
            values, offsets = flat.parts[part].jagged[field["name"]]
            array = arrays[f"{part}.{field['name']}"].reshape(len(flat.parts[part]), -1)
            assert array.shape[1] == field["length"] and array.max() < field["rows"]
            for row, (start, end) in enumerate(itertools.pairwise(offsets)):
                assert array[row].tolist() == [*values[start:end].tolist(), *[0] * (field["length"] - (end - start))]
    with pytest.raises(ValueError, match="/flat"):
        peer_inputs(load("movielens_1m", cache))
    assert peer_request(flat, POINTS["frappe"][0])["hidden"] == list(SIZES["dcnv2"][0]["hidden"])


def test_the_peers_loop_keeps_the_best_epoch_and_stops() -> None:
    class Fixed(torch.nn.Module):
        """Its quality is what ``signs`` says after each epoch; ``state`` counts epochs."""

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(3, 2)
            self.register_buffer("state", torch.zeros(()))

    model, signs = Fixed(), (1.0, 1.0, -1.0, -1.0, 1.0)

    def step(inputs: Inputs, labels: torch.Tensor) -> None:
        assert model.training
        model.state += 1

    def probability(inputs: Inputs) -> torch.Tensor:
        assert not model.training
        return torch.sigmoid(signs[int(model.state) - 1] * inputs["x"].float())

    request = {"epochs": 5, "patience": 2, "batch_size": 8, "seed": 0, "fields": [{"name": "x"}]}
    arrays = {f"{part}.{key}": torch.arange(8.0) > 3 for part in ("train", "valid", "test") for key in ("x", "label")}
    arrays = {name: value.float() for name, value in arrays.items()}
    peer = Peer(model, step, probability)
    valid = train(peer, request, arrays)
    assert [v["auc"] for v in valid] == [1.0, 1.0, 0.0] and model.state == 1  # the first of two equals; two worse ones end it
    assert predict(peer, request, arrays, "test").shape == (8,)
    assert sizes(model) == {"table_parameters": 6, "dense_parameters": 0}


def planted_records(grid: Grid, cache: Path, scores: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    records = []
    for model, seeds in scores.items():
        for seed, values in enumerate(seeds):
            cell = f"{model}{seed}"
            grid.predictions(cell).parent.mkdir(parents=True, exist_ok=True)
            np.save(grid.predictions(cell), values.astype(np.float32))
            labels = load("frappe", cache).parts["test"].labels
            test = {"auc": roc_auc_score(labels, values), "logloss": 0.5, "gauc": 0.5}
            common = {
                "version": quality_grid.VERSION,
                "fingerprint": "f",
                "point": {},
                "budget": {},
                "config": {},
                "dense_parameters": 1000,
                "seconds": 2.0,
            }
            records.append({"cell": cell, "data": "frappe", "model": model, "stage": "final", "seed": seed, "test": test, **common})
    return records


def test_the_summary_tells_better_from_worse_and_from_noise(cache: Path) -> None:
    labels = load("frappe", cache).parts["test"].labels
    random = np.random.default_rng(3)

    def scored(signal: float) -> list[np.ndarray]:
        return [np.clip(0.5 + signal * (labels - 0.5) + random.normal(0, 0.1, len(labels)), 0, 1) for _ in range(2)]

    scores = {"dcnv2": scored(0.1), "tokenmixer_large": scored(0.5), "unimixer": scored(0.0), "wukong": scored(0.1)}
    comparison = Comparison(planted_records(Grid(cache / "r", cache=cache), cache, scores), cache)
    checks = {check.name: check for check in comparison.checks()}
    assert checks["frappe_tokenmixer_large_not_below_dcnv2"].holds and checks["frappe_tokenmixer_large_not_below_wukong"].holds
    assert not checks["frappe_unimixer_not_below_dcnv2"].holds
    assert checks["best_above_dcnv2_on_one_set"].holds and "tokenmixer_large" in checks["best_above_dcnv2_on_one_set"].note
    assert not any("rankmixer" in name for name in checks)  # it is not there yet
    means = {m: float(np.mean([roc_auc_score(labels, v) for v in values])) for m, values in scores.items()}
    interval = comparison.difference("frappe", "tokenmixer_large", "dcnv2")
    assert interval is not None and interval.estimate == pytest.approx(means["tokenmixer_large"] - means["dcnv2"], abs=1e-6)
    rows = comparison.rows()
    assert [row["model"] for row in rows] == sorted(means, key=lambda m: -means[m]) and rows[0]["seeds"] == 2
    page = markdown(Result("x", rows, comparison.checks()))
    assert "| frappe | tokenmixer_large | 2 | 1,000 |" in page and "| frappe_unimixer_not_below_dcnv2 | no |" in page


def test_the_summary_leaves_out_seeds_of_an_older_setting(cache: Path) -> None:
    labels = load("frappe", cache).parts["test"].labels
    records = planted_records(Grid(cache / "r", cache=cache), cache, {"dcnv2": [labels, labels, labels]})
    again = json.loads(json.dumps(records[0])) | {"point": {"learning_rate": 1.0}}
    assert not Comparison([record | {"version": quality_grid.VERSION - 1} for record in records], cache).scored
    assert [len(Comparison(r, cache).scored["frappe", "dcnv2"].records) for r in (records, [*records, again])] == [3, 1]
