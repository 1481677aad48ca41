# SPDX-License-Identifier: Apache-2.0
import json
import logging
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.core.errors import CheckpointError
from recsys.training import checkpoint
from recsys.training.checkpoint import MANIFEST, Checkpoints

RUN = {"trainer": {"epochs": 3, "optimizer": {"name": "adamw"}}}


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((4, 3), float(step))}, "progress": {"step": step}}


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def store(root: Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(root, keep, RUN)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    store(tmp_path).save(7, state(7), best=None)
    found = store(tmp_path).latest()
    assert found.directory == tmp_path / "step-7" and found.manifest.step == 7
    assert found.read("progress") == {"step": 7}
    assert torch.equal(found.read("model")["w"], torch.full((4, 3), 7.0))
    assert names(found.directory) == {MANIFEST, "model.json", "model.safetensors", "progress.json"}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, a file cannot grow beyond ``size`` bytes."""
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [10, 5000])
def test_a_disk_that_is_full_is_an_error_and_leaves_what_is_there(size: int, tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1))
    large = {"model": {"w": torch.ones(10_000)}, "progress": {"step": 2}}
    with files_of_at_most(size), pytest.raises(CheckpointError, match=r"step-2: cannot be written: .*File too large"):
        store(tmp_path).save(2, large)
    assert names(tmp_path) == {"step-1"}
    assert store(tmp_path).latest().manifest.step == 1
    store(tmp_path).save(2, large)
    assert store(tmp_path).latest().manifest.step == 2


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert store(tmp_path / "absent").latest() is None
    assert store(tmp_path).latest() is None


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        store(tmp_path).save(step, state(step))
    assert store(tmp_path).latest().manifest.step == 100


def test_the_newest_stay_and_the_best_of_each_of_them(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=2)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2)):
        checkpoints.save(step, state(step), best)
    assert names(tmp_path) == {"step-2", "step-3", "step-4"}
    checkpoints.save(5, state(5), best=5)  # 4 still refers to 2
    assert names(tmp_path) == {"step-2", "step-4", "step-5"}
    checkpoints.save(6, state(6), best=5)
    assert names(tmp_path) == {"step-5", "step-6"}


class Crash(BaseException):
    """What a killed process does: nothing after it."""


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crash before the n-th change of the disk, for every n until saving ends without one, and look what is there."""
    operations = [(checkpoint, "save_file"), (checkpoint, "write_json"), (checkpoint, "_sync"), (Path, "rename"), (shutil, "rmtree")]
    crashes = 0
    for n in range(1, 100):
        root = tmp_path / str(n)
        store(root, keep).save(1, state(1), best=1)
        store(root, keep).save(2, state(2), best=1)
        left = [n]

        def counted(function: Any, left: list[int] = left) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise Crash
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for place, name in operations:
                patch.setattr(place, name, counted(getattr(place, name)))
            try:
                store(root, keep).save(2, state(20), best=2)  # replaces one, makes another one superfluous
                store(root, keep).save(3, state(3), best=2)
                ended = True
            except Crash:
                ended, crashes = False, crashes + 1
        found = store(root, keep).latest()
        assert found.read("model")["w"][0, 0] in (2, 20, 3)
        assert found.read("progress")["step"] == found.read("model")["w"][0, 0]
        assert not any(name.endswith((".tmp", ".old", ".invalid")) for name in names(root))
        if ended:
            break
    assert ended and crashes > 20


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", [MANIFEST, "model.json", "model.safetensors", "progress.json"])
@pytest.mark.parametrize("position", [0, 17, -2])
def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_taken(
    tmp_path: Path, file: str, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        store(tmp_path).save(step, state(step))
    damage(tmp_path / "step-2" / file, position)
    with caplog.at_level(logging.WARNING):
        found = store(tmp_path).latest()
    assert found.manifest.step == 1 and torch.equal(found.read("model")["w"], state(1)["model"]["w"])
    assert "going back to step 1" in caplog.text and f"step-2/{file}" in caplog.text
    assert names(tmp_path) == {"step-1", "step-2.invalid"}, "it must not be taken for the newest one again"
    store(tmp_path).save(2, state(2))
    assert store(tmp_path).latest().manifest.step == 2


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path).save(step, state(step))
    (tmp_path / "step-3" / "model.safetensors").unlink()
    (tmp_path / "step-2" / MANIFEST).unlink()
    assert store(tmp_path).latest().manifest.step == 1


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2)):
        store(tmp_path).save(step, state(step), best)
    damage(tmp_path / "step-2" / "model.safetensors", -1)
    assert store(tmp_path).latest().manifest.step == 1


def test_no_valid_checkpoint_is_an_error_which_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        store(tmp_path).save(step, state(step))
        damage(tmp_path / f"step-{step}" / "model.safetensors", -1)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint is valid: .*step-2/model\.safetensors: sha256 is .*, expected .*step-1/"):
            store(tmp_path).latest()
    with pytest.raises(CheckpointError, match=r"step-1/model\.safetensors: sha256"):
        store(tmp_path).at(1)
    with pytest.raises(CheckpointError, match=r"step-5/MANIFEST\.json: cannot be read: No such file"):
        store(tmp_path).at(5)


def test_a_manifest_of_another_layout_is_an_error(tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1))
    path = tmp_path / "step-1" / MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    content["format"] = 2
    path.write_text(json.dumps(content | {"sha256": checkpoint.sha256_json(content)}))
    with pytest.raises(CheckpointError, match="format: Input should be 1, got 2"):
        store(tmp_path).at(1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"trainer": {"epochs": 4, "optimizer": {"name": "adamw"}}}, r"trainer\.epochs: the checkpoint was written with 3, this run has 4"),
        ({"trainer": {"epochs": 3, "optimizer": {"name": "adam"}}}, r"trainer\.optimizer\.name: .* with 'adamw', this run has 'adam'"),
        ({"trainer": {"epochs": 3, "optimizer": {}}}, r"trainer\.optimizer\.name: .* with 'adamw', this run has no such key"),
        ({**RUN, "seed": 1}, r"seed: .* with no such key, this run has 1"),
    ],
)
def test_another_run_is_refused_by_the_key_that_differs(tmp_path: Path, run: dict, message: str) -> None:
    store(tmp_path).save(1, state(1))
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, 3, run).latest()


def test_an_option_that_came_later_and_is_not_used_is_no_difference(tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1))
    found = Checkpoints(tmp_path, 3, {**RUN, "efficiency": None, "trainer": {**RUN["trainer"], "later": None}}).latest()
    assert found is not None and found.manifest.step == 1
    with pytest.raises(CheckpointError, match=r"efficiency: .* with no such key, this run has \{\}"):
        Checkpoints(tmp_path, 3, {**RUN, "efficiency": {}}).latest()


def test_what_only_a_pickle_could_hold_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be saved without a pickle"):
        store(tmp_path).save(1, {"model": object()})
    assert store(tmp_path).latest() is None
