# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or not there: written beside, synced, hashed, and renamed into place.

::

    step-120/
      MANIFEST.json                      written last: the run's configuration, and the hash of every file and of itself
      model.json  model.safetensors      one pair for each part of the state (see `recsys.training.tree`)
      optimizer.json ...

A directory ``step-N.tmp`` is one that was never finished, ``step-N.invalid`` one that was found damaged and passed over. Nothing is
pickled, and a file is read only after its hash was found right.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recsys.core.config import Config, parse
from recsys.core.errors import CheckpointError, RecsysError
from recsys.core.files import read_json, sha256_file, sha256_json, write_json
from recsys.training.tree import pack, unpack

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d+)")

logger = logging.getLogger(__name__)


class Checkpointing(Config):
    """How often a run saves its state, beside every validation that is the best so far and the end.

    Attributes:
        every_seconds: at the first step after so many seconds; None for never.
        every_steps: at every multiple of so many steps; None for never.
        keep: how many of the newest checkpoints stay. The best one of each of them stays as well.
    """

    every_seconds: float | None = Field(600, gt=0)
    every_steps: int | None = Field(None, ge=1)
    keep: int = Field(3, ge=1)


class Manifest(Config):
    """What a checkpoint says of itself.

    Attributes:
        format: the layout's version.
        step: optimizer steps done.
        best: the step whose weights were best so far, None before the first validation. Its checkpoint is kept while this one is.
        run: what decides the run's course, such as its configuration.
        files: the SHA-256 of every other file.
    """

    format: Literal[1] = 1
    step: int
    best: int | None
    run: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint that was found on disk."""

    directory: Path
    manifest: Manifest

    def __contains__(self, part: str) -> bool:
        return f"{part}.json" in self.manifest.files

    def read(self, part: str) -> Any:
        """One part of the state, as it was given to `Checkpoints.save`."""
        tensors = self.directory / f"{part}.safetensors"
        return unpack(read_json(self.directory / f"{part}.json"), load_file(tensors) if tensors.name in self.manifest.files else {})


class Checkpoints:
    """The checkpoints of one run.

    Args:
        root: their folder.
        keep: how many of the newest stay.
        run: what decides the run's course; a plain nested mapping. A checkpoint of another run is refused.
    """

    def __init__(self, root: Path, keep: int, run: Mapping[str, Any]) -> None:
        self.root = root
        self._keep = keep
        self._run: dict[str, Any] = json.loads(json.dumps(run))

    def save(self, step: int, state: Mapping[str, Any], best: int | None = None) -> Path:
        """Write a checkpoint whole or not at all, then remove those that need not be kept.

        Args:
            step: optimizer steps done; a checkpoint of the same step is replaced.
            state: nested tensors and plain values for each part.
            best: the step with the best weights so far.

        Raises:
            CheckpointError: the state holds something that cannot be saved without a pickle, or the disk does not take it.
        """
        try:
            temporary = self.begin(step)
            for part, value in state.items():
                write_part(temporary, part, value)
            return self.finish(step, best, {path.name: sha256_file(path) for path in sorted(temporary.iterdir())})
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.directory(step, ".tmp"), ignore_errors=True)
            raise CheckpointError(f"{self.directory(step)}: cannot be written: {error}") from None

    def begin(self, step: int) -> Path:
        """An empty directory for the parts of a checkpoint, which is none before `finish`."""
        self.root.mkdir(parents=True, exist_ok=True)
        temporary = self.directory(step, ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary

    def finish(self, step: int, best: int | None, files: Mapping[str, str]) -> Path:
        """Make what was written since `begin` the checkpoint of its step: the manifest, then the name.

        Args:
            step: see `save`.
            best: see `save`.
            files: the SHA-256 of every file.
        """
        final, temporary = self.directory(step), self.directory(step, ".tmp")
        manifest = Manifest(step=step, best=best, run=self._run, files=dict(files)).model_dump(mode="json")
        write_json(temporary / MANIFEST, manifest | {"sha256": sha256_json(manifest)})
        _sync(temporary)
        self._put(temporary, final)
        self._prune()
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete, and whose best one is complete as well; None where there never was any.

        Newer ones that are damaged are passed over with a warning and renamed to ``step-N.invalid``.

        Raises:
            CheckpointError: there are checkpoints, but all of them are damaged; or the newest good one is of another run, in which case
                the first key that differs is named.
        """
        self._recover()
        damaged: list[str] = []
        for step in self._steps():
            try:
                found = self.at(step)
                if found.manifest.best not in (None, step):
                    self.at(found.manifest.best)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            self._check_run(found)
            self._pass_over(step, damaged)
            return found
        if damaged:
            raise CheckpointError(f"{self.root}: no checkpoint is valid: {'; '.join(damaged)}")
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step, once all its hashes have been found right.

        Raises:
            CheckpointError: it is incomplete or damaged; names the file.
        """
        directory = self.directory(step)
        manifest = _read_manifest(directory)
        for name, expected in manifest.files.items():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: is absent")
            if (found := sha256_file(path)) != expected:
                raise CheckpointError(f"{path}: sha256 is {found}, expected {expected}")
        return Checkpoint(directory, manifest)

    def directory(self, step: int, suffix: str = "") -> Path:
        """Where the checkpoint of a step stands."""
        return self.root / f"step-{step}{suffix}"

    def _steps(self) -> list[int]:
        """The steps of all checkpoints, newest first."""
        if not self.root.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _put(self, temporary: Path, final: Path) -> None:
        """Rename into place. Where something is in that place, it steps aside first, and `_recover` knows the way back."""
        aside = final.with_name(f"{final.name}.old")
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        temporary.rename(final)
        _sync(self.root)
        shutil.rmtree(aside, ignore_errors=True)

    def _recover(self) -> None:
        """Clear away what a killed process left."""
        for aside in self.root.glob("step-*.old"):
            final = aside.with_suffix("")
            if final.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(final)
        for unfinished in self.root.glob("step-*.tmp"):
            shutil.rmtree(unfinished)

    def _check_run(self, found: Checkpoint) -> None:
        if different := _difference(found.manifest.run, self._run):
            key, saved, current = different
            raise CheckpointError(
                f"{found.directory}: {key}: the checkpoint was written with {saved}, this run has {current}; "
                "continue with the old value, or use another run directory"
            )

    def _pass_over(self, step: int, damaged: list[str]) -> None:
        """Out of the way with everything newer than ``step``: a run that continues from there must not be taken for older than that."""
        for newer in (s for s in self._steps() if s > step):
            target = self.directory(newer, ".invalid")
            shutil.rmtree(target, ignore_errors=True)
            self.directory(newer).rename(target)
        for message in damaged:
            logger.warning("checkpoint passed over, going back to step %d: %s", step, message)

    def _prune(self) -> None:
        kept = set(self._steps()[: self._keep])
        for step in tuple(kept):
            try:
                best = _read_manifest(self.directory(step)).best
            except CheckpointError:
                continue
            kept |= set() if best is None else {best}
        for step in self._steps():
            if step not in kept:
                # Renamed first: a checkpoint that is being removed must not look like one that is damaged.
                doomed = self.directory(step, ".tmp")
                shutil.rmtree(doomed, ignore_errors=True)
                self.directory(step).rename(doomed)
                shutil.rmtree(doomed)


def write_part(directory: Path, part: str, value: Any) -> None:
    """Write a nested state as JSON, with its tensors beside it, and force them onto the disk."""
    packed, tensors = pack(value)
    write_json(directory / f"{part}.json", packed)
    if tensors:
        path = directory / f"{part}.safetensors"
        save_file(tensors, path)
        _sync(path)


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        content = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not even text
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("sha256", None) != sha256_json(content):
        raise CheckpointError(f"{path}: was changed: its own sha256 does not fit")
    try:
        return parse(Manifest, content, source=str(path))
    except RecsysError as error:
        raise CheckpointError(str(error)) from None


def _sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _difference(saved: Any, current: Any, path: str = "") -> tuple[str, str, str] | None:
    """The first dotted key with unequal values, and both values as text. Null is as good as no key: an older run knows newer options."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            below = f"{path}.{key}" if path else key
            if saved.get(key) is None and current.get(key) is None:
                continue
            if key not in saved or key not in current:
                return below, _text(saved, key), _text(current, key)
            if found := _difference(saved[key], current[key], below):
                return found
        return None
    return None if saved == current else (path, repr(saved), repr(current))


def _text(mapping: dict[str, Any], key: str) -> str:
    return repr(mapping[key]) if key in mapping else "no such key"
