# SPDX-License-Identifier: Apache-2.0
import hashlib
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.core.errors import BundleError, DataError
from recsys.retrieval.catalogue import Catalogue

identifier = st.text(min_size=0, max_size=4)


def test_rows_are_the_places_of_the_ids_and_stay_when_items_are_appended() -> None:
    catalogue = Catalogue(["b", "a", "é"])
    assert catalogue.rows(["a", "é", "b", "x", "a"]).tolist() == [1, 2, 0, -1, 1]
    catalogue.add(pa.array(["x", "c"]))
    assert catalogue.rows(["a", "é", "b", "x", "c"]).tolist() == [1, 2, 0, 3, 4]
    assert catalogue.rows([]).tolist() == []
    assert catalogue.rows([]).dtype == catalogue.rows(["a"]).dtype == np.int64


@pytest.mark.parametrize(
    "ids",
    [
        ["c", None, "a", "nobody"],
        pa.array(["c", None, "a", "nobody"]),
        pa.array(["c", None, "a", "nobody"], pa.large_string()),
        pa.array(["c", None, "a", "nobody"]).dictionary_encode(),
        pa.chunked_array([["c", None], ["a"], ["nobody"]]),
        pa.array(["skipped", "c", None, "a", "nobody"])[1:],
    ],
)
def test_every_form_of_ids_is_understood_and_null_is_unknown(ids: object) -> None:
    assert Catalogue(["a", "b", "c"]).rows(ids).tolist() == [2, -1, 0, -1]


@given(st.lists(identifier, unique=True), st.lists(identifier))
@settings(max_examples=50, deadline=None)
def test_rows_against_a_list(ids: list[str], asked: list[str]) -> None:
    catalogue = Catalogue(ids)
    rows = catalogue.rows(asked)
    assert rows.tolist() == [ids.index(item) if item in ids else -1 for item in asked]
    assert catalogue.ids(rows).to_pylist() == [item if item in ids else None for item in asked]


def test_ids_of_rows_reject_foreign_rows() -> None:
    catalogue = Catalogue(["a", "b"])
    assert catalogue.ids(np.array([1, -1, 0])).to_pylist() == ["b", None, "a"]
    for row in (2, -2):
        with pytest.raises(DataError, match=rf"{row} is not a row.*-1 to 1"):
            catalogue.ids(np.array([0, row]))


def test_live_bits_and_bitmap() -> None:
    catalogue = Catalogue([f"i{i}" for i in range(11)])
    catalogue.set_live(["i3", "i9", "i3"], False)
    catalogue.set_live(["i9"], True)
    catalogue.add(["new"])
    view = catalogue.snapshot()
    assert np.flatnonzero(~view.live).tolist() == [3]
    assert view.live_count == 11 and view.count == 12
    for row in range(12):
        assert bool(view.bitmap[row // 8] >> (row % 8) & 1) == view.live[row]


def test_a_snapshot_never_changes() -> None:
    catalogue = Catalogue(["a", "b"])
    view = catalogue.snapshot()
    catalogue.set_live(["a"], False)
    catalogue.add(["c"])
    assert view.live.tolist() == [True, True]
    assert view.ids.to_pylist() == ["a", "b"]
    assert view.rows(["c", "b"]).tolist() == [-1, 1]
    assert catalogue.rows(["c"]).tolist() == [2]
    with pytest.raises(ValueError):
        view.live[0] = False
    with pytest.raises(ValueError):
        view.bitmap[0] = 0


def test_the_version_moves_with_the_content_only() -> None:
    catalogue = Catalogue(["a", "b"])
    first = catalogue.version
    catalogue.set_live(["a"], True)
    catalogue.set_live([], False)
    catalogue.add([])
    assert catalogue.version == first
    catalogue.set_live(["a"], False)
    second = catalogue.version
    catalogue.set_live(["a"], True)
    assert second.number == first.number + 1 and second.digest != first.digest
    assert catalogue.version == (first.number + 2, first.digest)
    ids_digest = catalogue.snapshot().ids_digest
    catalogue.set_live(["b"], False)
    assert catalogue.snapshot().ids_digest == ids_digest
    catalogue.add(["c"])
    assert catalogue.snapshot().ids_digest != ids_digest


def test_the_digest_is_of_the_content_however_it_came_about() -> None:
    whole, grown = Catalogue(["a", "bé", "", "d"]), Catalogue(["a"])
    grown.add(["bé", ""])
    grown.add(pa.array(["x", "d"])[1:])
    assert grown.version.digest == whole.version.digest
    assert grown.version.number == 3
    lengths, content = np.array([1, 3, 0, 1], "<i8").tobytes(), "abéd".encode()
    ids_digest = hashlib.sha256(hashlib.sha256(lengths).digest() + hashlib.sha256(content).digest()).hexdigest()
    assert whole.snapshot().ids_digest == ids_digest
    assert whole.version.digest == hashlib.sha256(ids_digest.encode() + bytes([0b1111])).hexdigest()


@pytest.mark.parametrize("other", [["ab", "c"], ["c", "ab"], ["a", "bc", "d"], ["abcd"], ["a", "bcd", ""]])
def test_other_ids_have_another_digest(other: list[str]) -> None:
    assert Catalogue(["a", "bcd"]).version.digest != Catalogue(other).version.digest


def test_errors_name_the_ids_and_change_nothing() -> None:
    catalogue = Catalogue(["a", "b"])
    view = catalogue.snapshot()
    with pytest.raises(DataError, match="given twice: 'c'"):
        catalogue.add(["c", "d", "c"])
    with pytest.raises(DataError, match="in the catalogue already: 'b'"):
        catalogue.add(["c", "b"])
    with pytest.raises(DataError, match="no null"):
        catalogue.add(["c", None])
    with pytest.raises(DataError, match="not in the catalogue: 'u0', 'u1', 'u2', 'u3', 'u4' and 2 more"):
        catalogue.set_live(["a", *(f"u{i}" for i in range(7))], False)
    with pytest.raises(DataError, match="expected strings"):
        catalogue.rows([1])
    with pytest.raises(DataError, match="expected strings, got int64"):
        catalogue.rows(pa.array([1]))
    with pytest.raises(DataError, match="got the string 'ab'"):
        catalogue.rows("ab")
    assert catalogue.snapshot() is view
    assert catalogue.rows(["c"]).tolist() == [-1]
    with pytest.raises(DataError, match="given twice: 'a'"):
        Catalogue(["a", "a"])


def test_save_and_load(tmp_path: Path) -> None:
    catalogue = Catalogue(["a", "bé", "c"])
    catalogue.set_live(["bé"], False)
    path = tmp_path / "deep" / "catalogue.arrow"
    catalogue.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["catalogue.arrow"]
    table = pa.ipc.open_file(path).read_all()
    assert table.to_pydict() == {"item_id": ["a", "bé", "c"], "live": [True, False, True]}
    loaded = Catalogue.load(path)
    assert loaded.version == catalogue.version and loaded.version.number == 2
    assert loaded.snapshot().ids_digest == catalogue.snapshot().ids_digest
    assert np.array_equal(loaded.snapshot().live, catalogue.snapshot().live)
    loaded.add(["d"])
    catalogue.add(["d"])
    assert loaded.version == catalogue.version
    assert loaded.rows(["d", "a"]).tolist() == [3, 0]


def test_an_empty_catalogue_is_one(tmp_path: Path) -> None:
    catalogue = Catalogue()
    assert catalogue.snapshot().count == 0 and catalogue.rows(["a"]).tolist() == [-1]
    catalogue.save(tmp_path / "c")
    loaded = Catalogue.load(tmp_path / "c")
    assert loaded.version == catalogue.version
    loaded.add(["a"])
    assert loaded.rows(["a"]).tolist() == [0]


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot read"):
        Catalogue.load(tmp_path / "none")
    path = tmp_path / "c"
    path.write_bytes(b"not arrow")
    with pytest.raises(BundleError, match="cannot read"):
        Catalogue.load(path)

    Catalogue(["a", "b"]).save(path)
    honest = pa.ipc.open_file(path).read_all()
    forged = pa.table([honest["item_id"], pa.array([True, False])], schema=honest.schema)
    for table, message in (
        (forged, "digest is"),
        (pa.table([pa.array(["a", "a"]), honest["live"]], schema=honest.schema), "not a catalogue: ids: given twice"),
        (honest.replace_schema_metadata({**honest.schema.metadata, b"version": b"x"}), "not a catalogue"),
        (honest.replace_schema_metadata(None), "and a version"),
        (honest.rename_columns(["x", "live"]), "expected the columns"),
    ):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(BundleError, match=message):
            Catalogue.load(path)


def test_readers_always_see_one_whole_state() -> None:
    """A reader's view holds together at every moment: bits, bitmap, ids and rows are of the same length, and its ids map to themselves."""
    catalogue = Catalogue(["0"])
    stop = threading.Event()
    faults: list[str] = []

    def read() -> None:
        last = 0
        while not stop.is_set():
            view = catalogue.snapshot()
            if view.version.number < last:
                faults.append("version went back")
            last = view.version.number
            if not len(view.ids) == len(view.live) == view.count or len(view.bitmap) != -(-view.count // 8):
                faults.append("lengths differ")
            if view.rows([str(view.count - 1), str(view.count)]).tolist() != [view.count - 1, -1]:
                faults.append("rows of another version")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(1, 400):
        catalogue.add([str(i)])
        catalogue.set_live([str(i // 2)], i % 2 == 0)
    stop.set()
    for reader in readers:
        reader.join()
    assert not faults
