# SPDX-License-Identifier: Apache-2.0
"""What of a recipe enters a key: plain values, and the modules that define the components which it names."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipelines.graph.digests import digests
from pipelines.graph.step import StepError


def plain(value: Any) -> Any:
    """A value fit for JSON: models are dumped, tuples are lists, paths are texts.

    Raises:
        StepError: it holds something else.
    """
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise StepError(f"recipe: {type(value).__qualname__} cannot enter a key; expected plain values and models")


def models_in(value: Any) -> Iterator[BaseModel]:
    """Every model in a value, itself included."""
    if isinstance(value, BaseModel):
        yield value
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from models_in(each)


def modules_of(value: Any) -> set[str]:
    """The modules that define the models in a value. A component's configuration stands beside the component, so these are their code."""
    return {type(model).__module__ for model in models_in(value)}


def files_of(value: Any) -> dict[str, str]:
    """The hash of every file that a path in a value names, those below a folder included; what is not there has none."""
    found: dict[str, str] = {}
    for model in models_in(value):
        for each in vars(model).values():
            if isinstance(each, Path):
                found |= hashes(each)
    return found


def hashes(path: Path) -> dict[str, str]:
    """The hash of a file, or of every file below a folder, by its name relative to the folder above; hidden ones do not count."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path.parent).parts[1:])]
    return {file.relative_to(path.parent).as_posix(): digest for file, digest in digests(visible).items()}
