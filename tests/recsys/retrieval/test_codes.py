# SPDX-License-Identifier: Apache-2.0
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.codes import code_items, extend, prefix_ids
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import CodeTokenizer, ResidualKMeans
from recsys.retrieval.tokenizers.base import Progress

REPAIRS = ["keep", "suffix", "nearest_free"]


class Grid(CodeTokenizer):
    """Features between 0 and 1, each cut into as many cells as its level has codes; a code stands for the middle of its cell."""

    class Config(BaseConfig):
        name: Literal["grid"] = "grid"
        sizes: tuple[int, ...] = (3, 5)
        seed: int = 0

    config: Config

    @property
    def level_sizes(self) -> tuple[int, ...]:
        return self.config.sizes

    def _build(self, width: int) -> None: ...

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None: ...

    def _encode(self, features_nd: Tensor) -> Tensor:
        sizes = torch.tensor(self.level_sizes)
        return torch.minimum((features_nd * sizes).long(), sizes - 1)

    def _decode(self, codes_nl: Tensor) -> Tensor:
        return (codes_nl + 0.5) / torch.tensor(self.level_sizes)


def grid(*sizes: int, seed: int = 0) -> Grid:
    return Grid(Grid.Config(sizes=sizes, seed=seed)).fit(items_of(torch.zeros(1, len(sizes))))


def items_of(features: Tensor) -> ItemTable:
    return ItemTable(len(features), torch.ones(len(features), dtype=torch.bool), features)


@st.composite
def catalogues(draw: st.DrawFn, rows: int = 25) -> tuple[Grid, ItemTable]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    seed, count = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, rows))
    return grid(*sizes), items_of(torch.rand(count, len(sizes), generator=torch.Generator().manual_seed(seed)))


def parts_of(table: CodeTable) -> list[tuple[int, ...]]:
    return [tuple(row) for row in table.codes.tolist()]


@given(catalogues())
@settings(max_examples=40, deadline=None)
def test_keep_is_what_the_tokenizer_says(catalogue: tuple[Grid, ItemTable]) -> None:
    tokenizer, items = catalogue
    table = code_items(tokenizer, items)
    assert torch.equal(table.codes, tokenizer.encode(items))
    assert (table.level_sizes, table.tokenizer, table.repair) == (tokenizer.level_sizes, tokenizer.fingerprint, "keep")
    assert (len(table), table.levels) == (items.count, len(tokenizer.level_sizes))


@given(catalogues())
@settings(max_examples=40, deadline=None)
def test_suffix_numbers_the_items_of_a_group_in_the_order_of_rows(catalogue: tuple[Grid, ItemTable]) -> None:
    tokenizer, items = catalogue
    table = code_items(tokenizer, items, "suffix", 30)
    before: Counter[tuple[int, ...]] = Counter()
    for raw, codes in zip(tokenizer.encode(items).tolist(), parts_of(table), strict=True):
        assert codes == (*raw, before[tuple(raw)])
        before[tuple(raw)] += 1
    assert table.level_sizes == (*tokenizer.level_sizes, 30)
    assert len(set(parts_of(table))) == items.count


def test_a_suffix_that_is_too_small_names_the_codes() -> None:
    features = torch.tensor([[0.1, 0.1], [0.9, 0.5], [0.9, 0.5], [0.1, 0.1], [0.9, 0.5]])
    assert code_items(grid(3, 5), items_of(features), "suffix", 3).codes[:, 2].tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(DataError, match=r"suffix: 3 items share the codes \[2, 2\], expected at most 2"):
        code_items(grid(3, 5), items_of(features), "suffix", 2)
    table = code_items(grid(3, 5), items_of(features[:4]), "suffix", 2)
    with pytest.raises(DataError, match=r"suffix: 3 items share the codes \[2, 2\], expected at most 2"):
        extend(table, grid(3, 5), items_of(features))


def hold_nearest_free(tokenizer: Grid, items: ItemTable, table: CodeTable) -> None:
    """Row by row: who comes first keeps the codes; who is moved gets the nearest last code of all that nobody before has."""
    size, level = tokenizer.level_sizes[-1], len(tokenizer.level_sizes) - 1
    taken: set[tuple[int, ...]] = set()
    assert items.text is not None
    for raw, codes, features in zip(tokenizer.encode(items).tolist(), parts_of(table), items.text.double().numpy(), strict=True):
        if tuple(raw) not in taken:
            assert codes == tuple(raw)
        else:
            assert codes not in taken and codes[:-1] == tuple(raw[:-1])
            away = np.abs((np.arange(size) + 0.5) / size - features[level])
            free = [code for code in range(size) if (*codes[:-1], code) not in taken]
            assert away[codes[-1]] <= away[free].min() + 1e-6
        taken.add(codes)
    assert len(taken) == items.count


@given(catalogues(rows=12))
@settings(max_examples=150, deadline=None)
def test_nearest_free_moves_all_but_the_first_to_the_nearest_free_code(catalogue: tuple[Grid, ItemTable]) -> None:
    tokenizer, items = catalogue
    raw = [tuple(row) for row in tokenizer.encode(items).tolist()]
    size = tokenizer.level_sizes[-1]
    if max(Counter(codes[:-1] for codes in raw).values(), default=0) > size:
        with pytest.raises(DataError, match=rf"nearest_free: all {size} codes of level {len(tokenizer.level_sizes) - 1} after"):
            code_items(tokenizer, items, "nearest_free")
    else:
        hold_nearest_free(tokenizer, items, code_items(tokenizer, items, "nearest_free"))


def test_nearest_free_in_numbers() -> None:
    """Ten cells: 0.52 is in cell 5 and next nearest to 4, then 6. The row that has 4 by itself comes too late for it."""
    features = torch.tensor([[0.52], [0.52], [0.45], [0.52]])
    assert code_items(grid(10), items_of(features), "nearest_free").codes.flatten().tolist() == [5, 4, 3, 6]


def one_by_one(tokenizer: CodeTokenizer, items: ItemTable) -> list[list[int]]:
    """Row by row, each free code of the last level decoded by itself; of equals the smaller code."""
    found: list[list[int]] = []
    for raw, features in zip(tokenizer.encode(items).tolist(), tokenizer.features(items), strict=True):
        if raw in found:
            free = [[*raw[:-1], code] for code in range(tokenizer.level_sizes[-1]) if [*raw[:-1], code] not in found]
            errors = [float((tokenizer.decode(torch.tensor([codes]))[0] - features).square().sum()) for codes in free]
            raw = free[int(np.argmin(errors))]
        found.append(raw)
    return found


class Counting(Grid):
    """A grid that notes how many rows and codes it is asked for at a time."""

    def __init__(self, config: Grid.Config) -> None:
        super().__init__(config)
        self.encoded: list[int] = []
        self.decoded: list[int] = []

    def _encode(self, features_nd: Tensor) -> Tensor:
        self.encoded.append(len(features_nd))
        return super()._encode(features_nd)

    def _decode(self, codes_nl: Tensor) -> Tensor:
        self.decoded.append(len(codes_nl))
        return super()._decode(codes_nl)


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_moved_together_as_they_would_be_one_by_one(seed: int) -> None:
    """Crowded cells: many rows repeat earlier ones, and some find their own code taken by one that was moved."""
    random = torch.Generator().manual_seed(seed)
    grids, means = grid(3, 4, 24), ResidualKMeans(ResidualKMeans.Config(levels=3, codes=16))
    spread = torch.rand(70, 3, generator=random) ** 2
    wide = torch.randn(200, 8, generator=random)
    close = wide[torch.randint(15, (70,), generator=random)] + 0.05 * torch.randn(70, 8, generator=random)
    for tokenizer, features in ((grids, spread), (means.fit(items_of(wide)), close)):
        items = items_of(features)
        raw, table = tokenizer.encode(items).tolist(), code_items(tokenizer, items, "nearest_free")
        assert table.codes.tolist() == one_by_one(tokenizer, items)
        moved = [row for row in range(70) if table.codes[row].tolist() != raw[row]]
        assert len(moved) > 10 and (tokenizer is means or any(raw[row] not in raw[:row] for row in moved))
        part = code_items(tokenizer, items_of(features[:30]), "nearest_free")
        assert torch.equal(extend(part, tokenizer, items).codes, table.codes)


def test_later_items_alone_are_encoded_and_what_rows_share_is_decoded_once() -> None:
    tokenizer = Counting(Grid.Config(sizes=(3, 40))).fit(items_of(torch.zeros(1, 2)))
    features = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    features[30:] = features[:30]
    table = code_items(tokenizer, items_of(features[:50]), "nearest_free")
    tokenizer.encoded.clear()
    tokenizer.decoded.clear()
    extend(table, tokenizer, items_of(features))
    assert tokenizer.encoded == [10]
    assert tokenizer.decoded == [40] * 3, "the 40 candidates after each of 3 codes, for all 10 rows"
    with pytest.raises(DataError, match=r"items\.text: row 61 is not finite"):
        extend(table, tokenizer, items_of(torch.cat((features, torch.tensor([[0.5, 0.5], [0.5, torch.nan]])))))


def test_nearest_free_says_where_nothing_is_left() -> None:
    with pytest.raises(DataError, match=r"all 2 codes of level 1 after \[2\] are taken; use the rule 'suffix'"):
        code_items(grid(3, 2), items_of(torch.full((3, 2), 0.9)), "nearest_free")


@pytest.mark.parametrize("repair", REPAIRS)
@given(catalogues(rows=40), st.lists(st.floats(0, 1), max_size=3))
@settings(max_examples=30, deadline=None)
def test_items_that_come_later_change_no_row_and_get_what_they_would_have_had(
    repair: Any, catalogue: tuple[Grid, ItemTable], shares: list[float]
) -> None:
    tokenizer, items = grid(*catalogue[0].level_sizes[:-1], 40), catalogue[1]
    whole = code_items(tokenizer, items, repair)
    assert items.text is not None
    table = code_items(tokenizer, items_of(items.text[:0]), repair)
    for count in [*sorted(int(share * items.count) for share in shares), items.count]:
        longer = extend(table, tokenizer, items_of(items.text[:count]))
        assert torch.equal(longer.codes[: len(table)], table.codes)
        table = longer
    assert torch.equal(table.codes, whole.codes)
    assert (table.level_sizes, table.tokenizer, table.repair) == (whole.level_sizes, whole.tokenizer, repair)


def test_later_items_need_the_same_tokenizer_and_the_rows_before_them() -> None:
    features = torch.rand(4, 2)
    table = code_items(grid(3, 5), items_of(features))
    other = grid(3, 5, seed=1)
    with pytest.raises(BundleError, match=rf"made by the tokenizer {table.tokenizer}, but got the tokenizer {other.fingerprint}"):
        extend(table, other, items_of(features))
    with pytest.raises(DataError, match="expected at least the 4 rows that have codes, got 3"):
        extend(table, grid(3, 5), items_of(features[:3]))


def test_coding_needs_a_known_rule_and_a_fitted_tokenizer() -> None:
    with pytest.raises(ConfigError, match="repair: expected one of keep, suffix, nearest_free, got 'best'"):
        code_items(grid(3, 5), items_of(torch.rand(2, 2)), "best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not fitted"):
        code_items(Grid(Grid.Config()), items_of(torch.rand(2, 2)))


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_prefix_ids_number_the_distinct_rows_in_their_order(seed: int, count: int, sizes: list[int]) -> None:
    codes = np.random.default_rng(seed).integers(0, sizes, (count, len(sizes)))
    rows = [tuple(row) for row in codes.tolist()]
    ids = prefix_ids(torch.from_numpy(codes), sizes)
    assert ids.dtype == np.int64
    assert ids.tolist() == [sorted(set(rows)).index(row) for row in rows]


def test_prefix_ids_of_more_codes_than_a_number_can_tell_apart() -> None:
    assert prefix_ids(torch.tensor([[9, 2**40, 3], [9, 2**40, 3], [9, 0, 2**40]]), [2**41] * 3).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0, 4], [2, 5]]), "level 1 has the codes 0 to 4, got 5"),
        (torch.tensor([[0, 4], [-1, 0]]), "level 0 has the codes 0 to 2, got -1"),
        (torch.tensor([[0, 1, 2]]), r"expected int64 \[N, 2\], got torch.int64 \[1, 3\]"),
        (torch.tensor([[0, 1]], dtype=torch.int32), r"expected int64 \[N, 2\], got torch.int32 \[1, 2\]"),
        (torch.tensor([0, 1]), r"expected int64 \[N, 2\]"),
    ],
)
def test_codes_that_are_none_are_named(codes: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CodeTable(codes, (3, 5), "t")


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("count", [0, 9])
def test_save_and_load(repair: Any, count: int, tmp_path: Path) -> None:
    tokenizer, features = grid(3, 20), torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    table = code_items(tokenizer, items_of(features[:count]), repair)
    table.save(tmp_path / "codes")
    loaded = CodeTable.load(tmp_path / "codes")
    assert torch.equal(loaded.codes, table.codes) and loaded.codes.dtype == torch.int64
    for name in ("level_sizes", "tokenizer", "repair"):
        assert getattr(loaded, name) == getattr(table, name)
    assert torch.equal(extend(loaded, tokenizer, items_of(features)).codes, code_items(tokenizer, items_of(features), repair).codes)


HONEST = {"level_sizes": [3, 5], "tokenizer": "t", "repair": "keep"}
CODES = torch.tensor([[0, 4], [2, 2]])


def stored(codes: Tensor = CODES, name: str = "codes", about: Any = None, metadata: Any = None, **changes: Any) -> Callable[[Path], None]:
    content = json.dumps({**HONEST, **changes} if about is None else about)
    return lambda file: save_file({name: codes}, file, {"codes": content} if metadata is None else metadata)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: None,
        lambda file: file.write_bytes(b"not codes"),
        lambda file: (stored()(file), file.write_bytes(file.read_bytes()[:-8])),
        stored(name="other"),
        stored(metadata={"other": "{}"}),
        stored(metadata={"codes": "{"}),
        stored(about=[]),
        stored(about={"level_sizes": [3, 5]}),
        stored(about={**HONEST, "level_sizes": 3}),
        stored(level_sizes=[3, 4]),
        stored(level_sizes=[3, 5, 2]),
        stored(level_sizes=[3, "5"]),
        stored(level_sizes=[3, 5.5]),
        stored(level_sizes=[[3], [5]]),
        stored(tokenizer=3),
        stored(repair="best"),
        stored(repair=["keep"]),
        stored(codes=CODES.int()),
        stored(codes=CODES.float()),
        stored(codes=-CODES),
        stored(codes=CODES.flatten()),
    ],
)
def test_files_that_are_no_tables_are_refused(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "codes")
    with pytest.raises(BundleError, match="codes: cannot read the codes"):
        CodeTable.load(tmp_path / "codes")


def test_a_file_without_metadata_is_refused(tmp_path: Path) -> None:
    save_file({"codes": CODES}, tmp_path / "codes")
    with pytest.raises(BundleError, match="cannot read the codes"):
        CodeTable.load(tmp_path / "codes")
