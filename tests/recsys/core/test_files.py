# SPDX-License-Identifier: Apache-2.0
"""Files and directories appear whole or not at all; hashes are those of the content."""

import hashlib
import json
from pathlib import Path

import pytest

from recsys.core.files import canonical_json, new_directory, read_json, sha256_file, sha256_json, write_bytes, write_json


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "x.bin"
    write_bytes(file, b"old")
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new" and [*file.parent.iterdir()] == [file]
    assert sha256_file(file) == hashlib.sha256(b"new").hexdigest()


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.bin"
    write_bytes(file, b"old")

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("recsys.core.files.os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old" and [*tmp_path.iterdir()] == [file]


def test_json_goes_and_comes_back(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "é"], "a": {"x": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert [*tmp_path.iterdir()] == []


def test_equal_values_hash_alike_in_any_order() -> None:
    assert canonical_json({"b": 1, "a": [1, {"z": 0, "y": 0}]}) == b'{"a":[1,{"y":0,"z":0}],"b":1}'
    assert sha256_json({"b": 1, "a": 2}) == sha256_json(json.loads('{"a": 2, "b": 1}')) != sha256_json({"a": 2, "b": "1"})


def test_a_directory_takes_its_name_when_it_is_full(tmp_path: Path) -> None:
    with new_directory(tmp_path / "deep" / "bundle") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "deep" / "bundle").exists()
    assert [file.name for file in (tmp_path / "deep" / "bundle").iterdir()] == ["x"]
    with pytest.raises(FileExistsError, match="exists already"), new_directory(tmp_path / "deep" / "bundle"):
        pass


def test_a_directory_that_failed_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), new_directory(tmp_path / "bundle") as folder:
        (folder / "x").write_text("1")
        raise RuntimeError("half way")
    assert [*tmp_path.iterdir()] == []
