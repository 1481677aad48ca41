# SPDX-License-Identifier: Apache-2.0
"""Compiled rankers on disk: a directory for each, named by what it was compiled from and for; never part of a bundle.

::

    <key>/  graph.pt2    what AOTInductor made: code for this processor, and the weights of the dense part
            about.json   `About`: the key in full, and the SHA-256 of the graph
"""

import logging
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from recsys.core.config import Config
from recsys.core.files import new_directory, read_json, sha256_file, sha256_json, write_json

GRAPH, ABOUT = "graph.pt2", "about.json"
log = logging.getLogger(__name__)


class Key(Config):
    """What a compiled ranker was made from and for. Another key, another ranker: nothing else of it is ever loaded.

    Attributes:
        format: of the graph's inputs.
        bundle: the bundle's SHA-256.
        torch: its version.
        machine: the architecture.
        processor: its capability as torch names it, and all that it can do, since the code is compiled for exactly that.
    """

    format: Literal[1] = 1
    bundle: str
    torch: str
    machine: str
    processor: str

    @classmethod
    def here(cls, bundle: str) -> "Key":
        """The key of a bundle on this host."""
        able = sorted(f"{name}={value}" for name, value in torch.cpu.get_capabilities().items())
        processor = f"{torch.backends.cpu.get_cpu_capability()} {sha256_json(able)}"
        return cls(bundle=bundle, torch=torch.__version__, machine=platform.machine(), processor=processor)

    @property
    def digest(self) -> str:
        """The name of its directory."""
        return sha256_json(self.model_dump(mode="json"))


class About(Config):
    """What stands beside a graph.

    Attributes:
        key: of the graph.
        span: where it begins, see `recsys.inference.compiled.graph.Span`.
        sha256: of the graph.
    """

    key: Key
    span: Literal["vectors", "fields"]
    sha256: str


def stored(cache: Path, key: Key) -> tuple[Path, About] | None:
    """The graph of a key, once its bytes have been found to be those that were written; None where there is none, or another."""
    directory = cache / key.digest
    if not directory.exists():
        return None
    try:
        about = About.model_validate(read_json(directory / ABOUT))
        wrong = _wrong(directory, about, key)
    except (OSError, ValueError, ValidationError) as error:
        wrong = f"cannot be read: {error}"
    if wrong is None:
        return directory / GRAPH, about
    log.warning("%s: %s; it is not loaded", directory, wrong)
    return None


def store(cache: Path, key: Key, span: Literal["vectors", "fields"], write: Callable[[Path], None]) -> tuple[Path, About]:
    """Write a graph, whole or not at all. What was there under its key, and is not whole, goes.

    Args:
        cache: the directory of all of them.
        key: of the graph.
        span: where it begins.
        write: is given the name of the graph's file, and writes it.

    Raises:
        OSError: it cannot be written.
    """
    directory = cache / key.digest
    if (found := stored(cache, key)) is not None:
        return found
    if directory.exists():
        shutil.rmtree(directory)
    try:
        with new_directory(directory) as root:
            write(root / GRAPH)
            about = About(key=key, span=span, sha256=sha256_file(root / GRAPH))
            write_json(root / ABOUT, about.model_dump(mode="json"))
    except OSError:
        # Another process of this host may have been faster; what it wrote is as good.
        found = stored(cache, key)
        if found is None:
            raise
        return found
    return directory / GRAPH, about


def _wrong(directory: Path, about: About, key: Key) -> str | None:
    if about.key != key:
        return f"expected the key {key}, got {about.key}"
    if (found := sha256_file(directory / GRAPH)) != about.sha256:
        return f"{GRAPH} was changed: sha256 {found}, expected {about.sha256}"
    return None
