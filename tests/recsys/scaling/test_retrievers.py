# SPDX-License-Identifier: Apache-2.0
"""Retrievers as what is scaled: costs, keys, what cells share, measures against brute force, and a sweep that goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.data.sequences import histories
from recsys.data.windows import SequenceLoader
from recsys.evaluation.metrics.ranking import ndcg_at, recall_at
from recsys.evaluation.retrieval import event_ranks, gather_scorer, vector_scorer
from recsys.retrieval.catalogue import Catalogue, GatherIndex
from recsys.retrieval.codes import code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import RecGPT, SASRec, SETRec
from recsys.scaling import HistoriesData
from recsys.scaling.item_side import ItemSide
from recsys.scaling.judge import Judge, own_loss
from recsys.scaling.retrieval_data import only
from recsys.scaling.retrievers import Retrievers
from recsys.scaling.sweep import Plan, cells, run_cell, subject_of, sweep
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer
from tests.recsys.scaling.small import ITEMS, MODELS, SECTIONS, TRAINER, USERS, source, write_histories

KMEANS = {"tokenizer": {"name": "residual_kmeans", "levels": 2, "codes": 4}}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hstu": ({"name": "hstu", "dim": 8, "max_length": 5}, {"text": None, "codes": None, "collaborative": None}),
    "rpg": ({"name": "rpg", "dim": 8, "blocks": 1, "max_length": 5}, {"collaborative": None}),
    "tiger": (
        {"name": "tiger", "dim": 8, "layers": 1, "heads": 2, "max_length": 5},
        {"codes": KMEANS | {"repair": "suffix", "suffix_size": 16}, "index": {"name": "beam", "width": 8}},
    ),
    "setrec of codes": (MODELS["setrec"] | {"semantic": "codes"}, {}),
}


@pytest.fixture
def data(tmp_path: Path) -> HistoriesData:
    write_histories(tmp_path / "data")
    return source(tmp_path / "data", held_out=0.2)


def plan(data: HistoriesData, *labels: str, **changed: Any) -> Plan:
    fields = {
        "data": data.config.model_dump(mode="json"),
        "training": {"batch_size": 16, "trainer": TRAINER},
        "architectures": [{"label": label, "model": MODELS[label]} for label in labels or MODELS],
        "seeds": [0],
        "rows": USERS,
    }
    return parse(Plan, fields | changed, source="test")


def keys(data: HistoriesData, label: str, **changed: Any) -> set[str]:
    return {cell.key for cell in cells(plan(data, label, **changed), Retrievers(data, data._folder / "shared"), "params")}


def built(data: HistoriesData, label: str, directory: Path, **changed: Any) -> Any:
    """A model of a cell before its training, and its table of items."""
    model = components.get("retriever", label)
    settings = model.Config(**MODELS[label] | changed)
    items = ItemSide(data, directory).table(settings, data.draw(USERS, 0), USERS, 0, NoProgress())
    torch.manual_seed(0)
    return model(settings, items), items


# --- what a retriever costs


def test_costs_of_sasrec_by_hand(data: HistoriesData, tmp_path: Path) -> None:
    d, blocks, longest, tokens = 12, 2, 7, 8
    config = SASRec.Config(dim=d, blocks=blocks, heads=2, ffn_multiplier=3, max_length=longest)
    found = Retrievers(data, tmp_path).costs(config)
    linear = d * d + d + 2 * d * d + 2 * d + d * d + d + 3 * d * d + 3 * d + 3 * d * d + d
    assert found.tables == ITEMS * d
    assert found.dense == found.active == blocks * (linear + 4 * d) + tokens * d + 2 * d + d  # positions, final norm, start token
    assert found.flops == blocks * (2 * tokens * (4 + 2 * 3) * d * d + 2 * tokens * (tokens + 1) * d)


def test_costs_of_models_that_are_not_bound_to_items(data: HistoriesData, tmp_path: Path) -> None:
    subject = Retrievers(data, tmp_path)
    for label in ("setrec", "recgpt"):
        model, _ = built(data, label, tmp_path)
        found = subject.costs(model.config)
        assert (found.tables, found.dense) == (0, sum(p.numel() for p in model.parameters()))
    # RecGPT: (L + 1) K tokens; four projections and a feed-forward part of 2 · 4 d²; attention to the items up to a token's own; the text's
    # slices of 8, and the heads' 16 codes.
    d, tokens = 8, 6 * 2
    assert found.flops == 2 * tokens * 12 * d * d + 2 * tokens * (tokens + 2) * d + 2 * 5 * 2 * 8 * d + 2 * 2 * 16 * d


@pytest.mark.parametrize("label", list(OTHERS))
def test_every_retriever_is_counted_trained_and_measured(data: HistoriesData, tmp_path: Path, label: str) -> None:
    model, settings = OTHERS[label]
    other = source(data._folder, held_out=0.2, **settings)
    some = plan(other, architectures=[{"label": label, "model": model}])
    subject = Retrievers(other, tmp_path / "shared")
    (cell,) = cells(some, subject, "params")
    config = cell.config
    table = ItemSide(other, tmp_path / "shared").table(config, other.draw(USERS, 0), USERS, 0, NoProgress())
    whole = components.build("retriever", config, table)
    assert cell.costs.tables == (ITEMS * model["dim"] if label == "hstu" else 0) and cell.costs.flops > 0
    assert cell.costs.tables + cell.costs.dense == sum(p.numel() for p in whole.parameters())
    metrics = run_cell(cell, some, subject, tmp_path / "cell", NoProgress())["metrics"]
    assert metrics["loss.warm"] > 0 and 0 <= metrics["ndcg@10.cold"] <= metrics["recall@10.cold"] <= 1


def test_costs_leave_the_random_state_as_it_is(data: HistoriesData, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Retrievers(data, tmp_path).costs(SASRec.Config(**MODELS["sasrec"]))
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_model_reads_has_to_be_there(data: HistoriesData, tmp_path: Path) -> None:
    for label, section in (("setrec", "collaborative"), ("setrec", "text"), ("recgpt", "codes")):
        bare = source(data._folder, **{section: None})
        with pytest.raises(ConfigError, match=f"architectures: {label}: data.{section}: a model reads it; expected a section, got null"):
            keys(bare, label)
    keys(source(data._folder, text=None, codes=None, collaborative=None), "sasrec")
    warm = [{"label": "warm", "model": MODELS["setrec"] | {"warm_start": True}}]
    with pytest.raises(ConfigError, match="architectures: warm: warm_start: every cell begins anew"):
        cells(plan(data, architectures=warm), Retrievers(data, tmp_path), "params")


# --- keys


@pytest.mark.parametrize(
    ("changed", "whose"),
    [
        ({"held_out": 0.1}, {"sasrec", "setrec", "recgpt"}),
        ({"seed": 1}, {"sasrec", "setrec", "recgpt"}),
        ({"windows": {"stride": 2}}, {"sasrec", "setrec", "recgpt"}),
        ({"text": {"encoder": {"name": "hashing", "dim": 32}, "columns": ["title"]}}, {"setrec", "recgpt"}),
        ({"text": {"encoder": {"name": "hashing", "dim": 16}, "columns": ["title", "title"]}}, {"setrec", "recgpt"}),
        ({"collaborative": SECTIONS["collaborative"] | {"training": {"batch_size": 8, "trainer": TRAINER}}}, {"setrec"}),
        ({"codes": SECTIONS["codes"] | {"repair": "nearest_free"}}, {"recgpt"}),
        ({"index": {"name": "gather", "tile": 64}}, {"recgpt"}),
        ({"path": "data/../data"}, set()),
    ],
)
def test_keys_change_with_what_decides_the_result(
    data: HistoriesData, changed: dict[str, Any], whose: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_DATA", str(data._folder.parent))
    settings = data.config.model_dump(mode="json") | changed
    other = source(Path(settings.pop("path")), **{key: value for key, value in settings.items() if key != "name"})
    for label in MODELS:
        assert (not keys(data, label) & keys(other, label)) == (label in whose)


def test_keys_change_with_seed_rows_and_training_and_not_with_how_often_it_is_saved(data: HistoriesData) -> None:
    first = keys(data, "setrec")
    for changed in ({"seeds": [1]}, {"rows": 5}, {"training": {"batch_size": 8, "trainer": TRAINER}}):
        assert not first & keys(data, "setrec", **changed)
    rarely = {"log_every": 7, "checkpoint": {"every_steps": 3}}
    assert first == keys(data, "setrec", training={"batch_size": 16, "trainer": TRAINER | rarely})
    recipe = {"collaborative": SECTIONS["collaborative"] | {"training": {"batch_size": 32, "trainer": TRAINER | rarely}}}
    assert first == keys(source(data._folder, held_out=0.2, **recipe), "setrec")


# --- what cells share


def test_collaborative_vectors_are_trained_once_for_events_and_seed(
    data: HistoriesData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[int] = []
    original = ItemSide._trained
    monkeypatch.setattr(ItemSide, "_trained", lambda self, *arguments: trained.append(1) or original(self, *arguments))
    config = SETRec.Config(**MODELS["setrec"])

    def vectors(rows: int, seed: int, of: HistoriesData = data) -> torch.Tensor:
        table = ItemSide(of, tmp_path / "shared").table(config, of.draw(rows, seed), rows, seed, NoProgress())
        assert table.collaborative is not None and table.text is not None and table.codes is None
        assert not table.collaborative[~table.warm].any() and table.collaborative[table.warm].any(1).all()
        assert torch.equal(table.warm, torch.from_numpy(np.isin(np.arange(ITEMS), of.draw(rows, seed).items)))
        return table.collaborative

    first = vectors(USERS, 0)
    assert torch.equal(vectors(USERS, 0), first) and len(trained) == 1
    assert len(list((tmp_path / "shared" / "collaborative").iterdir())) == 1 and not list((tmp_path / "shared" / "training").iterdir())
    for rows, seed, of in ((20, 0, data), (USERS, 1, data), (USERS, 0, source(data._folder))):
        assert not torch.equal(vectors(rows, seed, of), first)
    assert len(trained) == 4
    assert data.config.collaborative is not None
    train = data.draw(USERS, 0)
    torch.manual_seed(0)
    alone = SASRec(data.config.collaborative.model, ItemTable(ITEMS, torch.from_numpy(np.isin(np.arange(ITEMS), train.items))))
    loader = SequenceLoader(train, 5, 32, 0)
    Trainer(data.config.collaborative.training.trainer, tmp_path / "alone", progress=NoProgress()).fit(alone, loader)
    assert torch.equal(alone.collaborative_vectors(), first)


def test_codes_are_those_of_a_tokenizer_that_knows_the_warm_items(data: HistoriesData, tmp_path: Path) -> None:
    config, side = RecGPT.Config(**MODELS["recgpt"]), ItemSide(data, tmp_path)
    table = side.table(config, data.draw(USERS, 1), USERS, 1, NoProgress())
    assert data.config.codes is not None and table.codes is not None and table.collaborative is None
    plain = ItemTable(ITEMS, table.warm, side.text)
    tokenizer = components.build("item_tokenizer", data.config.codes.tokenizer).fit(plain, 1)
    assert torch.equal(table.codes.codes, code_items(tokenizer, plain).codes) and not table.warm.all()
    file = next((tmp_path / "codes").iterdir())
    before = file.stat().st_mtime_ns
    again = side.table(config, data.draw(USERS, 1), USERS, 1, NoProgress())
    assert again.codes is not None and again.codes.tokenizer == tokenizer.fingerprint and file.stat().st_mtime_ns == before
    assert side.table(SASRec.Config(), data.draw(9, 1), 9, 1, NoProgress()).text is None


def test_references_by_hand(data: HistoriesData, tmp_path: Path) -> None:
    subject, split = Retrievers(data, tmp_path), data.split
    found = subject.references()
    counts = np.bincount(split.train.items, minlength=ITEMS).astype(float)
    gains = []
    for number in range(len(split.test)):
        scores = counts.copy()
        scores[split.data.items[split.test.start[number] : split.test.event[number]]] = np.nan
        target = int(split.test.targets.values[number])
        above, equal = (scores > scores[target]).sum(), (scores == scores[target]).sum()
        rank = above + (equal + 1) / 2 if equal else np.inf
        gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
    cold = data.held_out[split.test.targets.values] | (counts[split.test.targets.values] == 0)
    assert found["popularity"] == pytest.approx(np.mean(gains))
    assert found["popularity.warm"] == pytest.approx(np.array(gains)[~cold].mean())
    assert set(found) == {f"{name}{part}" for name in ("popularity", "item_knn", "text_knn") for part in ("", ".warm", ".cold")}
    assert found["item_knn"] > found["popularity"] and found["item_knn.cold"] == 0 < found["text_knn.cold"]
    (file,) = (tmp_path / "references").iterdir()
    file.write_text(json.dumps({"popularity": 0.5}))
    assert subject.references() == {"popularity": 0.5}  # read, and not computed anew
    assert "text_knn" not in Retrievers(source(data._folder, text=None), tmp_path).references()


# --- measures


def scorer_of(model: Any, data: HistoriesData) -> Any:
    if not isinstance(model, RecGPT):
        return vector_scorer(model)
    return gather_scorer(model, GatherIndex.over(GatherIndex.Config(), model, Catalogue(data.items["item_id"]).snapshot()))


@pytest.mark.parametrize("label", list(MODELS))
def test_a_cell_s_measures_are_those_of_its_ranks(data: HistoriesData, tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, model, *rest: kept.append(model) or original(self, model, *rest))
    some, subject = plan(data, label), Retrievers(data, tmp_path / "shared")
    (cell,) = cells(some, subject, "params")
    row = run_cell(cell, some, subject, tmp_path / "cell", NoProgress())
    model, split = kept[-1], data.split
    ranks = event_ranks(scorer_of(model, data), split.data, split.test, 5)
    warm = ~(np.bincount(data.draw(USERS, 0).items, minlength=ITEMS) == 0)[split.test.targets.values]
    assert 0 < warm.sum() < len(warm)
    for name, mask in (("", np.ones_like(warm)), (".warm", warm), (".cold", ~warm)):
        assert row["metrics"][f"recall@10{name}"] == pytest.approx(recall_at(ranks[mask], 10).mean())
        assert row["metrics"][f"ndcg@10{name}"] == pytest.approx(ndcg_at(ranks[mask], 10).mean())
    assert {"recall@10", "ndcg@10", "loss"} <= row["curve"][-1].keys() and not [name for name in row["curve"][-1] if "." in name]
    assert ("loss.cold" in row["metrics"]) == (label != "sasrec") and json.loads(json.dumps(row)) == row


@pytest.mark.parametrize("label", ["sasrec", "setrec"])
def test_the_loss_of_vectors_by_brute_force(data: HistoriesData, tmp_path: Path, label: str) -> None:
    model, items = built(data, label, tmp_path, init_std=0.5)
    split = data.split
    found = Judge(split.data, data.draw(USERS, 0), split.test, ITEMS).sliced(model.eval())
    with torch.no_grad():
        vectors = model.item_vectors()
        losses: dict[bool, list[float]] = {True: [], False: []}
        for number, (batch, _) in enumerate(histories(split.data, split.test, 5, 1)):
            scores = (model.encode(batch).values.flatten() * vectors).sum(1)
            target = int(split.test.targets.values[number])
            if model.scorable[target]:
                others = scores[model.scorable]
                losses[bool(items.warm[target])].append(float(torch.log(torch.exp(others - scores[target]).sum())))
    assert len(losses[True]) > 5 and bool(losses[False]) == (label == "setrec")
    assert found["loss"] == pytest.approx(np.mean(losses[True] + losses[False]), rel=1e-5)
    assert found["loss.warm"] == pytest.approx(np.mean(losses[True]), rel=1e-5)
    assert found.get("loss.cold") == (pytest.approx(np.mean(losses[False]), rel=1e-5) if losses[False] else None)


def test_the_loss_of_codes_by_brute_force(data: HistoriesData, tmp_path: Path) -> None:
    model, items = built(data, "recgpt", tmp_path, init_std=0.5)
    split = data.split
    view = Catalogue(data.items["item_id"]).snapshot()
    index = GatherIndex.over(GatherIndex.Config(), model, view)
    found = Judge(split.data, data.draw(USERS, 0), split.test, ITEMS, index, view).sliced(model.eval())
    losses: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for number, (batch, _) in enumerate(histories(split.data, split.test, 5, 1)):
            target = int(split.test.targets.values[number])
            log_probs_kv = model.encode(batch).values[0]  # at temperature 1
            taken = [float(log_probs_kv[slot, code]) for slot, code in enumerate(model.tokens[target].tolist())]
            losses[bool(items.warm[target])].append(-float(np.mean(taken)))
    assert losses[False] and found["loss"] == pytest.approx(np.mean(losses[True] + losses[False]), rel=1e-5)
    assert found["loss.warm"] == pytest.approx(np.mean(losses[True]), rel=1e-5)
    assert found["loss.cold"] == pytest.approx(np.mean(losses[False]), rel=1e-5)


def test_steps_with_several_targets_count_each(tmp_path: Path) -> None:
    write_histories(tmp_path / "data", "event_time")
    data = source(tmp_path / "data")
    model, _ = built(data, "recgpt", tmp_path)
    steps = data.split.test
    twice = only(steps, np.ones(len(steps), bool))
    values = np.stack([steps.targets.values, (steps.targets.values + 5) % ITEMS], 1).flatten()
    object.__setattr__(twice, "targets", twice.targets._replace(values=values, offsets=2 * steps.targets.offsets))
    other = only(steps, np.ones(len(steps), bool))
    object.__setattr__(other, "targets", other.targets._replace(values=values[1::2]))
    both = [own_loss(model, data.split.data, part) for part in (steps, other)]
    assert own_loss(model, data.split.data, twice) == pytest.approx(np.mean(both), rel=1e-5) and both[0] != both[1]


# --- sweeps


def test_a_second_sweep_trains_nothing(data: HistoriesData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = plan(data, amounts={"rows": [15, USERS]})

    def run(axis: Any) -> list[tuple[Any, dict[str, Any], bool]]:
        subject = subject_of(data, tmp_path)
        return list(sweep(some, subject, cells(some, subject, axis), tmp_path, commit="abc", progress=NoProgress()))

    first = run("data")
    assert [trained for _, _, trained in first] == [True] * 6 and {cell.rows for cell, _, _ in first} == {15, USERS}
    assert not any((tmp_path / "training").iterdir())
    monkeypatch.setattr(Trainer, "fit", None)
    again = run("data")
    assert [(row, trained) for _, row, trained in again] == [(row, False) for _, row, _ in first]
    assert not any(trained for _, _, trained in run("params"))  # all users at the same sizes stand there already


def test_a_cell_does_not_depend_on_what_was_shared_before(data: HistoriesData, tmp_path: Path) -> None:
    some = plan(data, "setrec")
    rows = []
    for name, times in (("cold", 1), ("shared", 2)):
        for number in range(times):
            subject = Retrievers(data, tmp_path / name)
            (cell,) = cells(some, subject, "params")
            rows.append(run_cell(cell, some, subject, tmp_path / f"{name}{number}", NoProgress())["metrics"])
    assert rows[0] == rows[1] == rows[2]
