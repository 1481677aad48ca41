# SPDX-License-Identifier: Apache-2.0
"""What holds for every registered index, with every kind of state that it accepts."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config, parse
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.core.files import read_json, write_json
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue import Catalogue, CatalogueView, Index, check_pair, load_index
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import EncoderMemory, SlotLogProbs, SlotVectors

COUNT, SIZES, USERS = 60, (4, 6, 3), 5
State = SlotVectors | SlotLogProbs | EncoderMemory


class Weighted:
    """Log-probabilities from the mean of the memory and the code before. Nothing to score is not asked of it."""

    def __init__(self, values_bsd: Tensor, valid_bs: Tensor) -> None:
        weight = valid_bs.float()
        self._mean = (values_bsd * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)  # [B, V]

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        assert codes_bw.numel()
        return (self._mean[:, None] * (codes_bw[..., None] + 2)).log_softmax(2)


def vectors(users: int, tokenizer: str) -> SlotVectors:
    return SlotVectors(torch.randn(users, 2, 4, generator=torch.Generator().manual_seed(0)))


def log_probs(users: int, tokenizer: str) -> SlotLogProbs:
    return SlotLogProbs(torch.randn(users, 3, 6, generator=torch.Generator().manual_seed(1)).log_softmax(2), tokenizer)


def memory(users: int, tokenizer: str) -> EncoderMemory:
    values = torch.randn(users, 7, 6, generator=torch.Generator().manual_seed(2))
    return EncoderMemory(values, torch.arange(7).expand(users, 7) < 5, tokenizer, Weighted)


ITEMS = torch.randn(COUNT + 10, 8, generator=torch.Generator().manual_seed(3))


def over_vectors(config: Config, view: CatalogueView, tokenizer: str) -> Index:
    cls = components.get("index", str(vars(config)["name"]))
    index: Index = cls.build(config, ITEMS[: view.count], view, content_hash=tokenizer)
    return index


def over_codes(config: Config, view: CatalogueView, tokenizer: str) -> Index:
    codes = torch.from_numpy(np.random.default_rng(4).integers(0, SIZES, (COUNT + 10, 3)))
    cls = components.get("index", str(vars(config)["name"]))
    index: Index = cls.build(config, CodeTable(codes[: view.count], SIZES, tokenizer), view)
    return index


Build = Callable[[Config, CatalogueView, str], Index]
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}, {"delta": 0.02}],
    "hnsw": [{"neighbours": 4, "exact_below": 0.1}],
    "ivf": [{"lists": 5, "effort": 2}],
    "gather": [{"tile": 32}],
    "beam": [{"width": 20}, {"widths": [3, 4, 5], "children": 2, "renormalise": True}],
}
BUILDERS: dict[str, Build] = {"dense": over_vectors, "hnsw": over_vectors, "ivf": over_vectors, "gather": over_codes, "beam": over_codes}
STATES: dict[type, Callable[[int, str], State]] = {SlotVectors: vectors, SlotLogProbs: log_probs, EncoderMemory: memory}


@dataclass(frozen=True)
class Case:
    """One index with one of the states that it accepts."""

    name: str
    options: dict[str, Any]
    kind: type

    def config(self) -> Config:
        return parse(Recipe, {"index": {"name": self.name, **self.options}}, source="test").index

    def build(self, view: CatalogueView, tokenizer: str = "t") -> Index:
        return BUILDERS[self.name](self.config(), view, tokenizer)

    def extend(self, index: Any, view: CatalogueView) -> Index:
        new = ITEMS[index.meta.rows : view.count] if self.kind is SlotVectors else vars(self.build(view))["table"]
        longer: Index = index.extended(new, view)
        return longer

    def state(self, users: int = USERS, tokenizer: str = "t") -> Any:
        return STATES[self.kind](users, tokenizer)


class Recipe(Config):
    index: component_config("index")  # type: ignore[valid-type]


CASES = [
    Case(name, options, kind)
    for name in components.names("index")
    for options in CONFIGS.get(name, [])
    for kind in components.get("index", name).accepts
]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case.name, case.kind.__name__, *case.options]))


def catalogue(count: int = COUNT) -> Catalogue:
    made = Catalogue([f"i{i}" for i in range(count)])
    made.set_live([f"i{i}" for i in range(0, count, 7)], False)
    return made


def jagged(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([v for one in lists for v in one], np.int64), np.cumsum([0, *map(len, lists)])


def users_of(state: Any, chosen: list[int]) -> Any:
    fields = {name: getattr(state, name)[chosen] for name in ("values", "valid") if hasattr(state, name)}
    return replace(state, **fields)


def hold_equal(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> None:
    for left, right in zip(one, other, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_every_index_and_every_state_is_here() -> None:
    assert set(BUILDERS) == set(CONFIGS) == set(components.names("index"))
    assert {case.kind for case in CASES} == set(STATES)


@every
def test_lists_hold_distinct_live_wanted_items_best_first(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state()
    index = case.build(view)
    exclude = [list(range(user, 60, 2)) for user in range(USERS)]
    scorable = np.arange(60) % 5 > 0
    rows, scores = index.search(state, 50, view, jagged(exclude), scorable)
    assert rows.shape == scores.shape == (USERS, 50) and rows.dtype == np.int64 and scores.dtype == np.float32
    for user in range(USERS):
        allowed = [row for row in range(60) if row % 7 and row % 5 and row not in exclude[user]]
        found = rows[user, : len(allowed)]
        assert sorted(found) == allowed and (rows[user, len(allowed) :] == -1).all()
        assert np.isneginf(scores[user, len(allowed) :]).all() and np.isfinite(scores[user, : len(allowed)]).all()
        assert sorted(range(len(found)), key=lambda i: (-scores[user, i], found[i])) == list(range(len(found)))
    if not case.options.get("renormalise"):
        given = index.score(state, rows)
        np.testing.assert_allclose(given, scores, rtol=1e-4, atol=1e-5)
    assert index.log_partition(state, view, scorable).shape == (USERS,)


@every
def test_exclusions_may_be_jagged_tensors_and_repeat_themselves(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state()
    index = case.build(view)
    exclude = [[3, 5, 3], [], [-1, 8], [0], list(range(60))]
    values, offsets = jagged(exclude)
    found = index.search(state, 60, view, (values, offsets))
    hold_equal(found, index.search(state, 60, view, JaggedTensor(torch.from_numpy(values), offsets=torch.from_numpy(offsets))))
    hold_equal(found, index.search(state, 60, view, jagged([sorted(set(own) - {-1, 0}) for own in exclude])))
    assert (found[0][4] == -1).all()


@every
def test_users_are_answered_one_by_one(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state()
    index = case.build(view)
    rows, scores = index.search(state, 9, view, jagged([[user] for user in range(USERS)]))
    for user in (0, USERS - 1):
        own_rows, own_scores = index.search(users_of(state, [user]), 9, view, jagged([[user]]))
        np.testing.assert_array_equal(own_rows, rows[user : user + 1])
        np.testing.assert_allclose(own_scores, scores[user : user + 1], rtol=1e-5)


@every
def test_no_users(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state(0)
    index = case.build(view)
    for exclude in (None, jagged([])):
        rows, scores = index.search(state, 3, view, exclude)
        assert rows.shape == scores.shape == (0, 3) and rows.dtype == np.int64 and scores.dtype == np.float32
    assert index.score(state, np.zeros((0, 4), np.int64)).shape == (0, 4)
    assert index.score(case.state(), np.zeros((USERS, 0), np.int64)).shape == (USERS, 0)
    assert index.log_partition(state, view).shape == (0,)


@every
def test_no_items_and_none_that_may_be_recommended(case: Case, tmp_path: Path) -> None:
    state, rows = case.state(), np.full((USERS, 2), -1)
    empty = Catalogue().snapshot()
    index = case.build(empty)
    index.save(tmp_path / "index")
    for none in (index, type(index).load(tmp_path / "index", empty)):
        for exclude in (None, jagged([[-1]] * USERS)):
            hold_equal(none.search(state, 2, empty, exclude), (rows, np.full((USERS, 2), -np.inf, np.float32)))
        assert np.isneginf(none.score(state, rows)).all()
        assert none.log_partition(state, empty).shape == (USERS,)
    made = catalogue()
    made.set_live([f"i{i}" for i in range(60)], False)
    view = made.snapshot()
    hold_equal(case.build(view).search(state, 2, view), (rows, np.full((USERS, 2), -np.inf, np.float32)))


@every
def test_malformed_requests(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state(2)
    index = case.build(view)
    for k in (0, -1):
        with pytest.raises(DataError, match=f"k: expected at least 1, got {k}"):
            index.search(state, k, view)
    for row in (60, -2):
        with pytest.raises(DataError, match=f"exclude: {row} is not a catalogue row: expected -1 to 59"):
            index.search(state, 1, view, jagged([[0], [row]]))
        with pytest.raises(DataError, match=f"rows: {row} is not a catalogue row: expected -1 to 59"):
            index.score(state, np.full((2, 1), row))
    for offsets in ([], [0, 1], [0, 2, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1, 1]):
        with pytest.raises(DataError, match="exclude: expected 3 ascending offsets from 0 to 1"):
            index.search(state, 1, view, (np.array([0]), np.array(offsets)))
    for scorable, got in ((np.ones(59, bool), "bool"), (np.ones(60), "float64")):
        with pytest.raises(DataError, match=rf"scorable: expected bool \[60\], got {got}"):
            index.search(state, 1, view, scorable=scorable)
        with pytest.raises(DataError, match="scorable: expected bool"):
            index.log_partition(state, view, scorable=scorable)
    for rows in (np.zeros((3, 1), np.int64), np.zeros(2, np.int64)):
        with pytest.raises(DataError, match=r"rows: expected shape \[2, C\]"):
            index.score(state, rows)


@every
def test_a_state_that_is_not_finite(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state()
    state.values[3] = torch.nan
    index = case.build(view)
    for ask in (lambda: index.search(state, 2, view), lambda: index.score(state, np.zeros((USERS, 1), np.int64))):
        with pytest.raises(DataError, match="state: row 3"):
            ask()


@every
def test_other_states_are_named_with_those_that_belong(case: Case) -> None:
    view = catalogue().snapshot()
    index = case.build(view)
    for kind in STATES.keys() - set(index.accepts):
        state = STATES[kind](USERS, "t")
        for ask in (
            lambda: index.search(state, 1, view),  # noqa: B023
            lambda: index.score(state, np.zeros((USERS, 1), np.int64)),  # noqa: B023
            lambda: index.log_partition(state, view),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match=rf"index '{case.name}' accepts .*{case.kind.__name__}.*, got {kind.__name__}"):
                ask()


@every
def test_states_of_other_shapes_are_an_error(case: Case) -> None:
    view, state = catalogue().snapshot(), case.state()
    index = case.build(view)
    with pytest.raises(ConfigError, match="state: "):
        index.search(replace(state, values=state.values[:, :, :-1]), 1, view)


@every
def test_other_catalogues(case: Case, tmp_path: Path) -> None:
    view, state = catalogue().snapshot(), case.state()
    index = case.build(view)
    index.save(tmp_path / "index")
    longer = catalogue(61).snapshot()
    for ask in (
        lambda: index.search(state, 1, longer),
        lambda: index.log_partition(state, longer),
        lambda: type(index).load(tmp_path / "index", longer),
    ):
        with pytest.raises(BundleError, match="built for 60 catalogue rows, but the catalogue has 61"):
            ask()
    other = Catalogue(["other", *(f"i{i}" for i in range(1, 60))]).snapshot()
    for ask in (lambda: index.search(state, 1, other), lambda: type(index).load(tmp_path / "index", other)):
        with pytest.raises(BundleError, match=f"catalogue ids: the index has {view.ids_digest}, expected {other.ids_digest}"):
            ask()


@every
def test_live_bits_may_change_after_an_index_was_built(case: Case) -> None:
    made, state = catalogue(), case.state()
    index = case.build(made.snapshot())
    made.set_live([f"i{i}" for i in range(60)], True)
    made.set_live([f"i{i}" for i in range(10, 60)], False)
    rows, _ = index.search(state, 10, made.snapshot())
    assert np.sort(rows, axis=1).tolist() == [list(range(10))] * USERS


@every
def test_other_tokenizers_and_models(case: Case, tmp_path: Path) -> None:
    view = catalogue().snapshot()
    index = case.build(view)
    index.save(tmp_path / "index")
    with pytest.raises(BundleError, match="content: the index has t, expected u"):
        type(index).load(tmp_path / "index", view, content_hash="u")
    assert type(index).load(tmp_path / "index", view, content_hash="t").meta == index.meta
    if case.kind is not SlotVectors:
        state = case.state(tokenizer="u")
        for ask in (
            lambda: index.search(state, 1, view),
            lambda: index.score(state, np.zeros((USERS, 1), np.int64)),
            lambda: index.log_partition(state, view),
        ):
            with pytest.raises(BundleError, match="state: tokenizer: the index has t, expected u"):
                ask()


@every
def test_save_and_load(case: Case, tmp_path: Path) -> None:
    view, state = catalogue().snapshot(), case.state()
    index = case.build(view)
    index.save(tmp_path / "index")
    with pytest.raises(FileExistsError):
        index.save(tmp_path / "index")
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    for loaded in (type(index).load(tmp_path / "index", view), load_index(tmp_path / "index", view)):
        assert type(loaded) is type(index) and loaded.config == index.config and loaded.meta == index.meta
        rows, scores = index.search(state, 12, view)
        hold_equal(loaded.search(state, 12, view), (rows, scores))
        hold_equal((loaded.score(state, rows),), (index.score(state, rows),))
        hold_equal((loaded.log_partition(state, view),), (index.log_partition(state, view),))


@every
def test_broken_indexes_are_refused(case: Case, tmp_path: Path) -> None:
    view = catalogue().snapshot()
    index = case.build(view)
    with pytest.raises(BundleError, match="cannot read the index"):
        type(index).load(tmp_path / "none", view)
    index.save(tmp_path / "index")
    honest = read_json(tmp_path / "index" / "index.json")
    for key, value, message in (
        ("accepts", ["Nothing"], r"user state: the index has \('Nothing',\)"),
        ("rows", 59, "built for 59 catalogue rows"),
        ("width", 99, r"the index has \(60, \d+\), expected \(60, 99\)"),
        ("rows", "many", "cannot read the index"),
        ("more", 1, "cannot read the index"),
    ):
        write_json(tmp_path / "index" / "index.json", {**honest, "meta": {**honest["meta"], key: value}})
        with pytest.raises(BundleError, match=message):
            type(index).load(tmp_path / "index", view)
    for config in ({"name": "other"}, {"name": case.name, "more": 1}, [], {"name": case.name, "widths": [3]}):
        write_json(tmp_path / "index" / "index.json", {**honest, "config": config})
        with pytest.raises(BundleError, match="cannot read the index"):
            type(index).load(tmp_path / "index", view)
    write_json(tmp_path / "index" / "index.json", honest)
    for content in {*(tmp_path / "index").iterdir()} - {tmp_path / "index" / "index.json"}:
        whole = content.read_bytes()
        for bad in (whole[:-9], b"nothing"):
            content.write_bytes(bad)
            with pytest.raises(BundleError, match="cannot read the"):
                type(index).load(tmp_path / "index", view)
        content.write_bytes(whole)
    assert type(index).load(tmp_path / "index", view).meta == index.meta


@every
def test_configurations_come_back_as_they_were(case: Case) -> None:
    config = case.config()
    assert type(config) is components.get("index", case.name).Config
    stored = Recipe(index=config).model_dump(mode="json")
    assert parse(Recipe, stored, source="test").index == config
    for option, value in case.options.items():
        assert stored["index"][option] == value
    with pytest.raises(ConfigError, match=r"index.more: unknown key 'more'"):
        parse(Recipe, {"index": {"name": case.name, "more": 1}}, source="test")


@every
def test_a_pair_that_fits_is_known(case: Case) -> None:
    class Own(Retriever):
        def encode(self, batch: Any) -> Any: ...

    Own.encode.__annotations__["return"] = case.kind
    check_pair(Own, case.build(catalogue().snapshot()))
    Own.encode.__annotations__["return"] = dict
    with pytest.raises(ConfigError, match=f"retriever Own gives dict, but index '{case.name}' accepts .*{case.kind.__name__}"):
        check_pair(Own, case.build(catalogue().snapshot()))


@every
def test_an_index_that_grows_in_steps_is_one_that_was_built_anew(case: Case, tmp_path: Path) -> None:
    """Scores may differ in the last bit, as they do between batch sizes."""
    made, state = catalogue(), case.state()
    index = case.build(made.snapshot())
    for first, last in ((60, 61), (61, 61), (61, 64), (64, 70)):
        made.add([f"i{i}" for i in range(first, last)])
        made.set_live([f"i{last - 1}", f"i{first - 3}"], False)
        view, exclude = made.snapshot(), jagged([[*range(user, last, 3), last - 2] for user in range(USERS)])
        index, whole = case.extend(index, view), case.build(view)
        assert index.meta == whole.meta and index.config == whole.config
        index.save(tmp_path / f"{first} {last}")
        listed = np.tile(np.arange(-1, last), (USERS, 1))
        for same in (index, type(index).load(tmp_path / f"{first} {last}", view, content_hash="t")):
            for k in (2, 80):
                for scorable in (None, np.arange(last) % 5 > 0):
                    rows, scores = same.search(state, k, view, exclude, scorable)
                    expected_rows, expected_scores = whole.search(state, k, view, exclude, scorable)
                    np.testing.assert_array_equal(rows, expected_rows)
                    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)
                    ours, theirs = same.log_partition(state, view, scorable), whole.log_partition(state, view, scorable)
                    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(same.score(state, listed), whole.score(state, listed), rtol=1e-5, atol=1e-6)


@every
def test_an_index_is_read_while_it_grows_and_afterwards(case: Case) -> None:
    made, state = catalogue(), case.state()
    view = made.snapshot()
    index = case.build(view)
    expected, present = index.search(state, 9, view), (index, view)

    def read(_: int) -> None:
        hold_equal(index.search(state, 9, view), expected)
        newest, its_view = present
        rows, _scores = newest.search(state, 80, its_view)
        assert (np.count_nonzero(rows >= 0, axis=1) == its_view.live_count).all()

    with ThreadPoolExecutor(3) as pool:
        reads = pool.map(read, range(30))
        for i in range(60, 70):
            made.add([f"i{i}"])
            present = (case.extend(present[0], made.snapshot()), made.snapshot())
        assert len(list(reads)) == 30
    read(0)
    assert present[0].meta.rows == 70 and index.meta.rows == 60


@pytest.mark.parametrize("case", [case for case in CASES if case.kind is not SlotVectors], ids=lambda case: case.name)
def test_an_index_over_codes_grows_by_rows_alone(case: Case) -> None:
    made = catalogue()
    index: Any = case.build(made.snapshot())
    made.add([f"i{i}" for i in range(60, 70)])
    view = made.snapshot()
    whole: Any = case.build(view)
    longer = index.extended(whole.table, view)
    assert longer.meta == whole.meta and longer.config == whole.config
    hold_equal(longer.search(case.state(), 9, view), whole.search(case.state(), 9, view))
    hold_equal((longer.score(case.state(), np.full((USERS, 1), 69)),), (whole.score(case.state(), np.full((USERS, 1), 69)),))

    table = whole.table
    with pytest.raises(DataError, match="each of the catalogue's 70, got 60"):
        index.extended(index.table, view)
    with pytest.raises(DataError, match="each of the catalogue's 70, got 60"):
        type(index).build(case.config(), index.table, view)
    with pytest.raises(BundleError, match="tokenizer: the index has t, expected u"):
        index.extended(replace(table, tokenizer="u"), view)
    with pytest.raises(BundleError, match="levels: the index has"):
        index.extended(replace(table, level_sizes=(9, 9, 9)), view)
    changed = table.codes.clone()
    changed[3] = (changed[3] + 1) % 3
    with pytest.raises(DataError, match="those of the 60 present rows unchanged"):
        index.extended(replace(table, codes=changed), view)
