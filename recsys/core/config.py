# SPDX-License-Identifier: Apache-2.0
"""Typed configuration: frozen, every key known, every error names the key, the file and the nearest known key.

A run is a recipe (a YAML file) plus overrides (``ranker.blocks=4``). A component's configuration is the class ``Config`` nested in
the class that it builds; a recipe chooses the component by its ``name`` (see `recsys.core.components`).
"""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recsys.core.errors import ConfigError, unknown

C = TypeVar("C", bound="Config")
Path_ = tuple[str | int, ...]


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)


class Problem(ValueError):
    """One invalid key below a component. A ValueError, so that pydantic adds the path of the fields above."""

    def __init__(self, path: Path_, message: str) -> None:
        super().__init__(message)
        self.path = path
        self.message = message


def parse(cls: type[C], data: Any, *, source: str, overrides: Sequence[str] = ()) -> C:
    """Build ``cls`` from plain data.

    Raises:
        ConfigError: names ``source`` (or the override that is to blame), the dotted key, its value, and what was expected.
    """
    try:
        return validate(cls, data)
    except Problem as problem:
        key = ".".join(str(part) for part in problem.path)
        blamed = _blamed(problem.path, overrides)
        where = f"--set {blamed}" if blamed else source
        raise ConfigError(f"{where}: {key}: {problem.message}" if key else f"{where}: {problem.message}") from None


def _blamed(path: Path_, overrides: Sequence[str]) -> str | None:
    """The last override that set the key at ``path``, a section above it, or a key below it."""
    for override in reversed(overrides):
        parts = override.split("=", 1)[0].strip().split(".")
        if all(part == str(key) for part, key in zip(parts, path, strict=False)) and path:
            return override
    return None


def validate(cls: type[C], data: Any) -> C:
    """Build ``cls`` from plain data, or raise the first `Problem` found; an unknown key before the absence of the key that it meant."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        path: Path_ = tuple(first["loc"])
        below = first.get("ctx", {}).get("error")
        if isinstance(below, Problem):
            raise Problem((*path, *below.path), below.message) from None
        if first["type"] == "extra_forbidden":
            known = _fields_at(cls, path[:-1])
            raise Problem(path, unknown("key", str(path[-1]), known)) from None
        if first["type"] == "missing":
            raise Problem(path, "is required, but missing") from None
        raise Problem(path, f"{first['msg']}, got {first['input']!r}") from None


def _fields_at(cls: type[BaseModel], path: Path_) -> list[str]:
    """The keys known at ``path`` below ``cls``."""
    current: Any = cls
    for part in path:
        model = _model_in(current)
        if model is not None and part in model.model_fields:
            current = model.model_fields[str(part)].annotation
    model = _model_in(current)
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first pydantic model inside an annotation such as ``tuple[Model, ...] | None``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, typing.get_args(annotation)) if m is not None), None)


def by_kind(kinds: Mapping[str, type["Config"]], what: str) -> Callable[[Any], "Config"]:
    """A validator that lets the key ``kind`` choose the configuration, so that errors propose the keys of that kind only.

    Args:
        kinds: the configurations by their kind.
        what: what they are, for errors.
    """

    def choose(value: Any) -> Config:
        if isinstance(value, Config):
            return value
        if not isinstance(value, dict) or "kind" not in value:
            raise Problem((), f"expected a mapping with the key 'kind', one of {', '.join(kinds)}; got {value!r}")
        if value["kind"] not in kinds:
            raise Problem(("kind",), unknown(what, str(value["kind"]), kinds))
        return validate(kinds[value["kind"]], value)

    return choose


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("recsys.recipes").iterdir() if p.name.endswith(".yaml"))


EXTENDS = "extends"


def read_recipe(recipe: str) -> tuple[dict[str, Any], str]:
    """The plain content of a shipped recipe or of a YAML file, and the name to use for it in errors.

    A recipe that says ``extends: other`` begins with the other one's content; see `merge`.
    """
    data, source = _read_one(recipe)
    seen = [recipe]
    while (base := data.pop(EXTENDS, None)) is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{source}: {EXTENDS}: expected the name of a recipe or a path, got {base!r}")
        if base in seen:
            raise ConfigError(f"{source}: {EXTENDS}: {' → '.join([*seen, base])} goes round in a circle")
        seen.append(base)
        below, _ = _read_one(base)
        data = merge(below, data)
    return data, source


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with what ``above`` says instead, key by key.

    Sections are merged, lists and values replaced. A section that names another component (a ``name`` or ``kind`` that differs) replaces
    the old one whole, since the old one's keys are not the new one's.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and all(value.get(k, old.get(k)) == old.get(k) for k in ("name", "kind")):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _read_one(recipe: str) -> tuple[dict[str, Any], str]:
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"recipe {recipe!r}: no such file")
        text, source = path.read_text(encoding="utf-8"), str(path)
    else:
        if recipe not in recipe_names():
            raise ConfigError(unknown("recipe", recipe, recipe_names()))
        text, source = resources.files("recsys.recipes").joinpath(f"{recipe}.yaml").read_text("utf-8"), f"{recipe}.yaml"
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected a mapping of keys, got {type(data).__name__}")
    return data, source


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``data`` with every ``dotted.key=value`` set; values are YAML."""
    result: dict[str, Any] = {k: _copy(v) for k, v in data.items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.strip().split(".")):
            raise ConfigError(f"--set {override}: expected dotted.key=value")
        try:
            set_key(result, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: {text!r} is not valid YAML") from None
        except ConfigError as error:
            raise ConfigError(f"--set {override}: {error}") from None
    return result


def set_key(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place; sections that are not there are made.

    Raises:
        ConfigError: names the part of the key that is a value and not a section.
    """
    *sections, last = key.split(".")
    for section in sections:
        child = data.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{section!r} is a value, not a section")
        data = child
    data[last] = value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def load_recipe(cls: type[C], recipe: str, overrides: Sequence[str] = ()) -> C:
    """Read, override and validate a recipe.

    Args:
        cls: the recipe's type.
        recipe: the name of a shipped recipe, or a path to a YAML file.
        overrides: ``dotted.key=value`` each.
    """
    from recsys.core.components import load_plugins

    data, source = read_recipe(recipe)
    data = apply_overrides(data, overrides)
    load_plugins(data.get("plugins", ()))
    return parse(cls, data, source=source, overrides=overrides)
