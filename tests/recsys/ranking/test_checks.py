# SPDX-License-Identifier: Apache-2.0
"""Bad input is named; good input is not looked at."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.errors import DataError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec
from recsys.ranking import checks
from recsys.ranking.mixers import Identity
from recsys.ranking.token_ranker import TokenRanker
from recsys.training.trainer import NonFiniteError, Trainer

Row = dict[str, Any]
LENGTHS = [2, 0, 3]


@pytest.fixture
def rows(make_rows: Callable[..., list[Row]]) -> list[Row]:
    return make_rows(LENGTHS)


@pytest.fixture
def batch(make_batch: Callable[[list[Row]], RankingBatch], rows: list[Row]) -> RankingBatch:
    return make_batch(rows)


def build(spec: InputSpec, **config: Any) -> TokenRanker:
    torch.manual_seed(0)
    return TokenRanker(TokenRanker.Config(dim=8, blocks=2, mixer=Identity.Config(), **config), spec)


def replaced(jagged: KeyedJaggedTensor, key: str, place: int, value: int) -> KeyedJaggedTensor:
    """The same values but for one, the ``place``-th of ``key``."""
    values = jagged.values().clone()
    start = jagged.offset_per_key()[jagged.keys().index(key)]
    values[start + place] = value
    return KeyedJaggedTensor(keys=jagged.keys(), values=values, lengths=jagged.lengths())


def renamed(jagged: KeyedJaggedTensor, old: str, new: str) -> KeyedJaggedTensor:
    keys = [new if key == old else key for key in jagged.keys()]  # noqa: SIM118 - a KeyedJaggedTensor is no mapping
    return KeyedJaggedTensor(keys=keys, values=jagged.values(), lengths=jagged.lengths())


def without(jagged: KeyedJaggedTensor, key: str) -> KeyedJaggedTensor:
    return jagged.permute([i for i, name in enumerate(jagged.keys()) if name != key])


@pytest.mark.parametrize(
    ("part", "key", "place", "value", "message"),
    [
        ("sparse", "user", 1, 20, "field 'user', row 1: expected a row of table 'user', 0 to 19, got 20"),
        ("sparse", "user", 2, -1, "field 'user', row 2: expected a row of table 'user', 0 to 19, got -1"),
        ("sequences", "item", 0, 30, "field 'item', row 0: expected a row of table 'item', 0 to 29, got 30"),
        ("sequences", "seen", 2, 10**12, "field 'seen', row 2: expected a row of table 'item', 0 to 29, got 1000000000000"),
        ("sequences", "seen_stars", 1, 7, "field 'seen_stars', row 0: expected a row of table 'stars', 0 to 6, got 7"),
    ],
)
def test_a_row_beyond_its_table_names_field_row_and_table(
    spec: InputSpec, batch: RankingBatch, part: str, key: str, place: int, value: int, message: str
) -> None:
    model, bad = build(spec), replaced(getattr(batch, part), key, place, value)
    setattr(batch, part, bad)
    for call in (model, model.loss, model.predict):
        with pytest.raises(DataError) as raised:
            call(batch)
        assert str(raised.value) == message
        assert isinstance(raised.value.__cause__, RuntimeError)  # what FBGEMM had to say


@pytest.mark.parametrize(("part", "key"), [("sparse", "user"), ("sparse", "genres"), ("sequences", "item"), ("sequences", "seen")])
def test_a_field_that_the_batch_lacks_is_named(spec: InputSpec, batch: RankingBatch, part: str, key: str) -> None:
    model, whole = build(spec), getattr(batch, part)
    for changed in (without(whole, key), renamed(whole, key, f"{key}_2")):
        setattr(batch, part, changed)
        with pytest.raises(DataError, match=f"^{part}: the batch has no field '{key}'; its fields are "):
            model(batch)


def test_an_error_of_a_batch_as_declared_stays_what_it_was(spec: InputSpec, batch: RankingBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(spec)

    def fail(_: RankingBatch) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.tables, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(batch)


@pytest.mark.parametrize(("value", "text"), [(2.0, "2"), (-1.0, "-1"), (0.5, "0.5"), (math.inf, "inf")])
def test_a_label_out_of_range_names_task_and_row(spec: InputSpec, batch: RankingBatch, value: float, text: str) -> None:
    assert batch.labels is not None
    batch.labels[0, 0], batch.labels[2, 1] = math.nan, value
    for model in (build(spec), build(spec, auxiliary="deep_supervision")):
        with pytest.raises(DataError, match=f"^labels: task 'like', row 2: expected 0, 1 or NaN, got {text}$"):
            model.loss(batch)
        model(batch)
    batch.labels[2, 1] = 1.0
    assert build(spec).loss(batch)[0].isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_dense_value_that_is_not_finite_names_column_and_row(spec: InputSpec, batch: RankingBatch, value: float) -> None:
    batch.dense[1, 1] = value
    model = build(spec)
    assert not model.loss(batch)[0].isfinite()
    assert model.diagnose(batch) == f"dense: column 'popularity', row 1: expected a finite number, got {value:g}"


@pytest.mark.parametrize("value", [math.nan, -1.0, math.inf])
def test_a_weight_that_is_none_names_its_row(spec: InputSpec, batch: RankingBatch, value: float) -> None:
    batch.weights = torch.tensor([1.0, 2.0, value])
    assert build(spec).diagnose(batch) == f"weights: row 2: expected a finite number of at least 0, got {value:g}"


def test_shapes_that_do_not_fit_are_named(spec: InputSpec, batch: RankingBatch) -> None:
    assert batch.labels is not None
    labels, dense = batch.labels, batch.dense
    batch.labels = labels[:, :1]
    assert checks.problem(batch, spec) == "labels: expected [3, 2], got [3, 1]"
    batch.labels, batch.weights = labels, torch.ones(2)
    assert checks.problem(batch, spec) == "weights: expected [3], got [2]"
    batch.weights, batch.dense = None, dense[:2]
    assert checks.problem(batch, spec) == "sparse: expected 2 rows, as many as in dense, got 3"
    batch.dense = dense[:, :1]
    assert checks.problem(batch, spec) == "dense: expected [B, 2], got [3, 1]"


def test_a_good_batch_has_no_problem_and_is_not_looked_at(spec: InputSpec, batch: RankingBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.problem(batch, spec) is None
    batch.labels = None
    assert checks.problem(batch, spec) is None

    def unexpected(*_: Any) -> None:
        raise AssertionError("a good batch was examined")

    monkeypatch.setattr(checks, "problem", unexpected)
    build(spec)(batch)


def test_weights_reach_the_loss_of_every_part(spec: InputSpec, rows: list[Row], make_batch: Callable[[list[Row]], RankingBatch]) -> None:
    for auxiliary in (None, "deep_supervision", "residual"):
        model, batch, repeated = build(spec, auxiliary=auxiliary), make_batch(rows), make_batch([rows[0], rows[2], rows[2]])
        batch.weights = torch.tensor([1.0, 0.0, 2.0])
        (loss, parts), (expected, expected_parts) = model.loss(batch), model.loss(repeated)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(parts, expected_parts)
        batch.weights = torch.tensor([1.0, 5.0, 2.0])
        assert not torch.isclose(model.loss(batch)[0], expected)


def test_weights_move_with_the_batch(batch: RankingBatch) -> None:
    assert batch.to(torch.device("cpu")).weights is None
    batch.weights = torch.tensor([1.0, 0.0, 2.0])
    moved = batch.to(torch.device("meta"))
    assert moved.weights is not None and moved.weights.device.type == "meta" and moved.weights.shape == (3,)


class Once:
    """A loader of one batch."""

    def __init__(self, batch: RankingBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        yield self.batch

    def __len__(self) -> int:
        return 1

    def set_epoch(self, epoch: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_training_names_what_made_the_loss_not_finite(
    spec: InputSpec, batch: RankingBatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch.dense[1, 0] = math.nan
    why = "dense: column 'age', row 1: expected a finite number, got nan"
    with pytest.raises(NonFiniteError, match=why):
        Trainer(Trainer.Config(epochs=2, max_skipped=1), tmp_path).fit(build(spec), Once(batch))
    assert caplog.text.count(f"left out: {why}") == 2
