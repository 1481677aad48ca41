# SPDX-License-Identifier: Apache-2.0
"""Sweeps: what decides a cell, solved sizes, one line for each finished cell, and going on after an interruption."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError, DataError, SchemaError
from recsys.data.batch import RankingBatch
from recsys.scaling import EncodedData, PlantedData, ScalingData, write_encoded
from recsys.scaling import sweep as module
from recsys.scaling.lines import Lines
from recsys.scaling.rankers import Rankers
from recsys.scaling.sweep import Architecture, Plan, cells, configure, run_cell, solve, sweep
from recsys.training.progress import NoProgress

EMBEDDING = {"dim": 4, "learning_rate": 0.1, "init_std": 0.1}
MIXER = {"name": "tokenmixer_large", "tokenizer": {"name": "groups"}, "dim": 8, "blocks": 1, "embedding": EMBEDDING}
FFN = {
    "name": "token_ranker",
    "dim": 8,
    "blocks": 1,
    "mixer": {"name": "identity"},
    "per_token": {"name": "swiglu"},
    "embedding": EMBEDDING,
}


def plan(**changed: Any) -> Plan:
    fields = {
        "data": {
            "name": "planted", "fields": 6, "groups": 3, "cardinality": [4, 8], "latent": 1, "dense": 0, "logit_std": 3.0, "bias": 0.0,
            "shares": {"main": 1.0, "pairwise": 0.0, "high_order": 0.0, "token_wise": 0.0}, "valid": 200, "test": 2000, "reference": 2000,
        },
        "training": {"batch_size": 64, "trainer": {"epochs": 1, "optimizer": {"name": "adam", "learning_rate": 0.01}}},
        "architectures": [
            {"label": "mixer", "model": MIXER, "sizes": [{"label": "s", "set": {"dim": 8}}, {"label": "m", "set": {"dim": 16}}]},
            {"label": "ffn", "model": FFN, "sizes": [{"label": "s", "set": {"per_token.expansion": 1}}]},
        ],
        "seeds": [0, 1],
        "rows": 640,
        "amounts": {"rows": [320, 128], "size": "s"},
    }  # fmt: skip
    return parse(Plan, fields | changed, source="test")


@pytest.fixture
def data() -> PlantedData:
    return PlantedData(plan().data)


def run(some: Plan, data: ScalingData, directory: Path, axis: Any = "params") -> list[tuple[Any, dict[str, Any], bool]]:
    return list(sweep(some, Rankers(data), cells(some, Rankers(data), axis), directory, commit="abc", progress=NoProgress()))


# --- cells


def test_cells_are_the_product_and_small_ones_come_first(data: PlantedData) -> None:
    made = cells(plan(), Rankers(data), "params")
    assert len(made) == 3 * 2 and len({cell.key for cell in made}) == 6
    assert [cell.costs.flops for cell in made] == sorted(cell.costs.flops for cell in made)
    amounts = cells(plan(), Rankers(data), "data")
    assert [cell.rows for cell in amounts] == [128] * 4 + [320] * 4 and {cell.size for cell in amounts} == {"s"}
    assert {cell.config.name for cell in made} == {"tokenmixer_large", "token_ranker"}  # type: ignore[attr-defined]


def test_costs_are_those_of_the_model(data: PlantedData) -> None:
    config = configure(plan().architectures[0], {"dim": 16}, "ranker")
    model = components.build("ranker", config, data.spec)
    expected = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables."))
    tables = sum(table.rows for table in data.spec.tables) * 4
    found = Rankers(data).costs(config)
    assert (found.dense, found.tables, found.flops) == (expected, tables, model.flops)


def test_a_key_is_the_hash_of_what_decides_a_ranker_s_result(data: PlantedData) -> None:
    """Lines of finished studies are found again by it: what stands in it may not change without a new ``_FORMAT``."""
    some = plan()
    left_out = {"checkpoint", "distribution", "guards", "kernels", "log_every", "max_skipped"}
    for cell in cells(some, Rankers(data), "params"):
        decides = {
            "format": 1,
            "data": data.config.model_dump(mode="json", exclude={"reference"}),
            "spec": data.spec.model_dump(mode="json"),
            "training": {"batch_size": 64, "trainer": some.training.trainer.model_dump(mode="json", exclude=left_out)},
            "model": cell.config.model_dump(mode="json"),
            "rows": 640,
            "seed": cell.seed,
        }
        assert cell.key == hashlib.sha256(json.dumps(decides, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": 641},
        {"seeds": [2, 3]},
        {"training": {"batch_size": 65, "trainer": {"epochs": 1, "optimizer": {"name": "adam", "learning_rate": 0.01}}}},
        {"training": {"batch_size": 64, "trainer": {"epochs": 2, "optimizer": {"name": "adam", "learning_rate": 0.01}}}},
    ],
)
def test_what_decides_the_result_changes_every_key(data: PlantedData, changed: dict[str, Any]) -> None:
    before, after = ({cell.key for cell in cells(some, Rankers(data), "params")} for some in (plan(), plan(**changed)))
    assert not before & after


def test_what_does_not_decide_the_result_changes_no_key(data: PlantedData) -> None:
    trainer = {"epochs": 1, "optimizer": {"name": "adam", "learning_rate": 0.01}, "log_every": 7, "checkpoint": {"every_steps": 3}}
    architectures = [a.model_dump() | {"label": a.label + " of ours"} for a in plan().architectures]
    other = plan(training={"batch_size": 64, "trainer": trainer}, architectures=architectures)
    assert {cell.key for cell in cells(plan(), Rankers(data), "params")} == {cell.key for cell in cells(other, Rankers(data), "params")}
    reference = PlantedData(data.config.model_copy(update={"reference": 3000}))
    seed = PlantedData(data.config.model_copy(update={"seed": 1}))
    keys = [{cell.key for cell in cells(plan(), Rankers(source), "params")} for source in (data, reference, seed)]
    assert keys[0] == keys[1] and not keys[0] & keys[2]


def test_groups_are_those_of_the_data(data: PlantedData) -> None:
    model: Any = components.build("ranker", configure(plan().architectures[0], {}, "ranker"), data.spec)
    assert model.tokenizer.groups == tuple(data.spec.groups.values()) and len(data.spec.groups) == 3


def test_data_without_groups_are_an_error_that_names_the_architecture(data: PlantedData) -> None:
    data.spec = data.spec.model_copy(update={"groups": {}})
    with pytest.raises(ConfigError, match="architectures: mixer: groups: the inputs have none"):
        cells(plan(), Rankers(data), "params")


def test_other_groups_are_other_cells(data: PlantedData) -> None:
    before = {cell.key for cell in cells(plan(), Rankers(data), "params")}
    data.spec = data.spec.model_copy(update={"groups": dict(zip("abc", data.spec.groups.values(), strict=True))})
    assert not before & {cell.key for cell in cells(plan(), Rankers(data), "params")}


def test_what_a_size_sets_does_not_change_the_recipe() -> None:
    architecture = plan().architectures[0]
    configure(architecture, {"embedding.dim": 16, "stack.inter_residual": None}, "ranker")
    assert architecture.model == MIXER and MIXER["embedding"] == {"dim": 4, "learning_rate": 0.1, "init_std": 0.1}


@pytest.mark.parametrize(
    ("architecture", "overrides", "message"),
    [
        ({"label": "a", "model": MIXER}, {"dmi": 8}, "architectures: a: model.dmi: unknown key 'dmi'; did you mean 'dim'"),
        ({"label": "a", "model": MIXER}, {"dim.x": 8}, "a: dim.x: 'dim' is a value"),
        ({"label": "a", "model": {"name": "tokenmixer_larg"}}, {}, "architectures: a: model.name: unknown ranker"),
    ],
)
def test_a_wrong_configuration_names_architecture_and_key(architecture: Any, overrides: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(Architecture(**architecture), overrides, "ranker")


def test_plans_that_cannot_be_swept(data: PlantedData) -> None:
    with pytest.raises(ConfigError, match="the axis 'data' needs amounts"):
        cells(plan(amounts=None), Rankers(data), "data")
    with pytest.raises(ConfigError, match="ffn has no size 'm', only s"):
        cells(plan(amounts={"rows": [10], "size": "m"}), Rankers(data), "data")
    wrong = [{"label": "mixer", "model": MIXER, "sizes": [{"label": "s", "set": {"dim": 10}}]}]
    with pytest.raises(ConfigError, match="architectures: mixer: token_mix: expected heads that divide dim"):
        cells(plan(architectures=wrong), Rankers(data), "params")
    twice = [{"label": "a", "model": FFN}] * 2
    with pytest.raises(ConfigError, match="'a' is used twice"):
        cells(plan(architectures=twice), Rankers(data), "params")


# --- the solver


@pytest.mark.parametrize(("what", "target"), [("dense", 2000), ("dense", 30_000), ("flops", 10_000), ("flops", 77_777)])
def test_a_solved_size_is_the_nearest_of_all_widths(data: PlantedData, what: Any, target: int) -> None:
    architecture = Architecture(label="ffn", model=FFN, multiple=2)
    found: Any = solve(architecture, Rankers(data), what, target)
    values = {w: getattr(Rankers(data).costs(configure(architecture, {"dim": w}, "ranker")), what) for w in range(2, 80, 2)}
    nearest = min(values, key=lambda w: abs(np.log(values[w] / target)))
    assert found.dim == nearest


def test_targets_make_the_sizes_of_an_axis(data: PlantedData) -> None:
    some = plan(params={"targets": [3000, 12_000]}, flops={"targets": [7000, 26_000]})
    for axis, targets in (("params", {"3k": 3000, "12k": 12_000}), ("flops", {"7k": 7000, "26k": 26_000})):
        made = cells(some, Rankers(data), axis)  # type: ignore[arg-type]
        assert {cell.size for cell in made} == set(targets)
        for cell in made:
            value = cell.costs.dense if axis == "params" else cell.costs.flops
            assert 1 / 1.5 < value / targets[cell.size] < 1.5


def test_lists_grow_in_every_element(data: PlantedData) -> None:
    architecture = Architecture(
        label="dcn", model={"name": "dcnv2", "embedding": EMBEDDING}, grow={"hidden": (2, 1), "rank": 1}, multiple=2
    )
    found: Any = solve(architecture, Rankers(data), "dense", 5000)
    assert found.hidden == (2 * found.rank, found.rank)


def test_targets_out_of_reach_are_errors(data: PlantedData) -> None:
    with pytest.raises(ConfigError, match=r"ffn: no width that is a multiple of 64 comes near 3,000 \(dense\)"):
        solve(Architecture(label="ffn", model=FFN, multiple=64), Rankers(data), "dense", 3000)
    with pytest.raises(ConfigError, match=r"grow: embedding\.learning_rate does not make the model larger"):
        solve(Architecture(label="ffn", model=FFN, grow={"embedding.learning_rate": 1}), Rankers(data), "dense", 10**7)


# --- lines


def test_a_cell_learns_and_its_line_says_all(data: PlantedData, tmp_path: Path) -> None:
    some = plan(rows=6400, seeds=[0])
    cell = cells(some, Rankers(data), "params")[0]
    row = run_cell(cell, some, Rankers(data), tmp_path, NoProgress())
    assert row["key"] == cell.key and row["rows"] == 6400 and row["steps"] == 100 and row["flops"] == cell.costs.flops
    assert row["params"] == {"tables": cell.costs.tables, "dense": cell.costs.dense, "active": cell.costs.active}
    bound = data.references()["auc"]
    assert 0.75 * bound < row["metrics"]["auc"] < bound + 0.02
    assert row["metrics"]["ne"] < 1 and row["seconds"] > 0
    assert json.loads(json.dumps(row)) == row


def test_finished_cells_are_skipped_and_new_ones_trained(data: PlantedData, tmp_path: Path) -> None:
    first = run(plan(), data, tmp_path)
    assert all(trained for _, _, trained in first) and not list((tmp_path / "training").iterdir())
    text = (tmp_path / "cells.jsonl").read_bytes()
    assert text.count(b"\n") == 6 and all(json.loads(line)["commit"] == "abc" for line in text.splitlines())
    again = run(plan(), data, tmp_path)
    assert not any(trained for _, _, trained in again) and (tmp_path / "cells.jsonl").read_bytes() == text
    assert [row for _, row, _ in again] == [row for _, row, _ in first]
    more = run(plan(seeds=[0, 1, 2]), data, tmp_path)
    assert [cell.seed for cell, _, trained in more if trained] == [2, 2, 2]


def test_a_torn_last_line_is_trained_again(data: PlantedData, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some = plan(seeds=[0])
    first = run(some, data, tmp_path)
    path = tmp_path / "cells.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING):
        second = run(some, data, tmp_path)
    assert "cells.jsonl:3: the last line was cut off" in caplog.text
    assert [trained for _, _, trained in second] == [False, False, True]
    assert second[-1][1]["metrics"] == first[-1][1]["metrics"]  # a cell is a function of what its key names
    assert len(Lines(path).read()) == 3 and path.read_bytes().count(b"\n") == 3


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"key": "a"}\n{"k\n{"key": "b"}\n')
    with pytest.raises(DataError, match=r"cells\.jsonl:2: expected a cell"):
        Lines(path).read()
    assert Lines(tmp_path / "none.jsonl").read() == {}


def test_an_interrupted_sweep_goes_on(data: PlantedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = plan(seeds=[0])
    whole = run(some, data, tmp_path / "whole")
    original, calls = module.run_cell, []

    def interrupted(*arguments: Any, **options: Any) -> dict[str, Any]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, "run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(some, data, tmp_path / "parts")
    rest = run(some, data, tmp_path / "parts")
    assert [trained for _, _, trained in rest] == [False, True, True]
    assert [row["metrics"] for _, row, _ in rest] == [row["metrics"] for _, row, _ in whole]


# --- encoded rows


class _Recipe(Config):
    data: component_config("scaling_data")  # type: ignore[valid-type]


def equal(a: RankingBatch, b: RankingBatch) -> bool:
    keyed = all(torch.equal(x.values(), y.values()) and x.keys() == y.keys() and torch.equal(x.lengths(), y.lengths())
                for x, y in ((a.sparse, b.sparse), (a.sequences, b.sequences)))  # fmt: skip
    assert a.labels is not None and b.labels is not None
    return keyed and torch.equal(a.dense, b.dense) and torch.equal(a.labels, b.labels)


@pytest.fixture
def encoded(tmp_path: Path) -> Iterator[tuple[PlantedData, EncodedData]]:
    shares = {"main": 0.5, "pairwise": 0.1, "high_order": 0.1, "token_wise": 0.1, "sequence": 0.2}
    sizes = {"fields": 6, "groups": 3, "cardinality": [4, 8], "dense": 2, "history": 3, "items": 9, "valid": 100, "test": 130}
    source = parse(_Recipe, {"data": {"name": "planted", "shares": shares, **sizes}}, source="test").data
    planted = PlantedData(source)
    parts = {"train": planted.train(300, 0, 64), "valid": planted.valid(64), "test": planted.test(64)}
    write_encoded(tmp_path / "rows", planted.spec, parts)
    config = parse(_Recipe, {"data": {"name": "encoded", "path": str(tmp_path / "rows")}}, source="test").data
    yield planted, EncodedData(config)


def test_encoded_rows_are_those_that_were_written(encoded: tuple[PlantedData, EncodedData]) -> None:
    planted, data = encoded
    assert data.spec == planted.spec and data.spec.groups and data.references() == {}
    for ours, theirs in ((data.valid(64), planted.valid(64)), (data.test(50), planted.test(50))):
        assert all(equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_encoded_training_rows_are_nested_and_seeded(encoded: tuple[PlantedData, EncodedData]) -> None:
    _, data = encoded

    def rows(count: int, seed: int) -> set[float]:
        loader = data.train(count, seed, 32)
        found = [x for batch in loader for x in batch.dense[:, 0].tolist()]
        assert len(found) == count
        return set(found)

    assert rows(50, 0) < rows(120, 0) and rows(50, 0) != rows(50, 1) and rows(300, 0) == rows(300, 1)
    with pytest.raises(DataError, match="rows: there are 300 training rows, got 301"):
        data.train(301, 0, 32)


def test_encoded_rows_can_be_swept(encoded: tuple[PlantedData, EncodedData], tmp_path: Path) -> None:
    _, data = encoded
    some = plan(rows=128, seeds=[0], architectures=[{"label": "mixer", "model": MIXER | {"dim": 12}}])
    ((_, row, _),) = run(some, data, tmp_path)
    assert 0 <= row["metrics"]["auc"] <= 1
    assert set(data.fingerprint) == {"spec.json", "train.parquet", "valid.parquet", "test.parquet"}


def test_a_folder_that_is_not_one_is_an_error(encoded: tuple[PlantedData, EncodedData], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no spec\.json"):
        EncodedData(EncodedData.Config(path=tmp_path))
    _, data = encoded
    spec = json.loads((data.config.path / "spec.json").read_text())
    spec["dense"].append("other")
    (data.config.path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"spec\.json: groups: field 'other' is in no group"):
        EncodedData(data.config)
    spec["groups"]["dense"].append("other")
    (data.config.path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(SchemaError, match="missing column: unknown column 'other'"):
        next(iter(EncodedData(data.config).valid(10)))
