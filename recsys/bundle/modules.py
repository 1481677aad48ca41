# SPDX-License-Identifier: Apache-2.0
"""A built component with weights in a directory: its configuration as JSON, its weights as safetensors."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from recsys.core import components
from recsys.core.config import parse
from recsys.core.errors import BundleError
from recsys.core.files import read_json, write_json
from recsys.embedding.served import read_only_tables


def save_module(directory: Path, module: Any, extra: dict[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        directory: must not exist.
        module: of a component, with its ``config``.
        extra: what it is besides its weights, see `recsys.retrieval.base.Retriever.extra_state`.
    """
    directory.mkdir()
    write_json(directory / "config.json", {"config": module.config.model_dump(mode="json"), "extra": extra or {}})
    save_file({k: v.detach().contiguous() for k, v in module.state_dict().items()}, directory / "model.safetensors")


def load_module(directory: Path, kind: str, inputs: Any, *, mmap: bool = False) -> Any:
    """The component of ``kind`` that `save_module` wrote, built over ``inputs`` and in evaluation mode.

    Args:
        directory: the component's.
        kind: ``ranker`` or ``retriever``.
        inputs: what it is built over.
        mmap: let the weights be the file's own pages, which processes share, and a ranker's tables `ServedTables`. Such a component is for
            inference alone. Where a ranker has managed ids, nothing of it is mapped: their maps are not fixed tensors.

    Raises:
        BundleError: the weights do not fit the configuration.
    """
    stored = read_json(directory / "config.json")
    cls = components.get(kind, stored["config"]["name"])
    config = parse(cls.Config, stored["config"], source=str(directory / "config.json"))
    mapped = mmap and not (kind == "ranker" and config.embedding.managed)
    with read_only_tables() if mapped else nullcontext():
        module = cls(config, inputs)
    try:
        module.load_state_dict(load_file(directory / "model.safetensors"), assign=mapped)
    except RuntimeError as error:
        raise BundleError(f"{directory}: the weights do not fit the configuration: {error}") from None
    if kind == "retriever":
        module.load_extra_state(stored["extra"])
    return module.eval()
