# SPDX-License-Identifier: Apache-2.0
"""Named components: a recipe says ``ranker: {name: tokenmixer_large, ...}`` and gets the class that registered that name.

The kinds are fixed; names are open. A user adds one without forking: ``plugins: [my_package]`` in a recipe imports the package,
whose modules call `register`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, cast

from pydantic import BeforeValidator, SerializeAsAny

from recsys.core.config import Config, Problem, validate
from recsys.core.errors import ComponentError, ConfigError, unknown

T = TypeVar("T", bound=type)

# Each kind with the modules that register what ships with the framework; they are imported when a name of the kind is first asked for.
KINDS: dict[str, tuple[str, ...]] = {
    "dataset": ("recsys.data.datasets",),
    "tokenizer": ("recsys.ranking.tokenizers",),
    "mixer": ("recsys.ranking.mixers",),
    "per_token": ("recsys.ranking.per_token",),
    "stack": ("recsys.ranking.stacks",),
    "head": ("recsys.ranking.heads",),
    "history": ("recsys.ranking.history",),
    "ranker": ("recsys.ranking.models",),
    "calibration": ("recsys.ranking.calibration", "recsys.ranking.group_calibration"),
    "item_tokenizer": ("recsys.retrieval.tokenizers",),
    "retriever": ("recsys.retrieval.models",),
    "set_backbone": ("recsys.retrieval.backbones",),
    "index": ("recsys.retrieval.catalogue",),
    "token_scorer": ("recsys.efficiency.scoring", "recsys.efficiency.pruning"),
    "selector": ("recsys.efficiency.selectors", "recsys.efficiency.pruning"),
    "sparse_attention": ("recsys.efficiency.attention",),
    "stop_test": ("recsys.efficiency.pruning",),
    "text_encoder": ("recsys.text",),
    "scaling_data": ("recsys.scaling",),
    "online_store": ("feature_store.online",),
    "feature_reader": ("feature_store.online",),
}

_registered: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Class decorator: make a class known as ``name`` among the components of ``kind``.

    The class must hold a nested ``Config`` (a `recsys.core.config.Config`) with the field ``name: Literal[<name>] = <name>``.
    """
    if kind not in KINDS:
        raise ComponentError(unknown("kind of component", kind, KINDS))

    def decorate(cls: T) -> T:
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, Config)):
            raise ComponentError(f"{cls.__qualname__}: a component needs a nested class Config(recsys.core.config.Config)")
        field = config.model_fields.get("name")
        if field is None or field.default != name:
            raise ComponentError(f"{cls.__qualname__}.Config: expected the field `name: Literal[{name!r}] = {name!r}`")
        present = _registered[kind].get(name)
        if present is not None and _path(present) != _path(cls):  # a module that is loaded anew registers again
            raise ComponentError(f"{kind} {name!r} is registered twice: by {_path(present)} and {_path(cls)}")
        _registered[kind][name] = cls
        return cls

    return decorate


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def names(kind: str) -> list[str]:
    """The registered names of ``kind``, sorted."""
    _import_builtin(kind)
    return sorted(_registered[kind])


def get(kind: str, name: str) -> Any:
    """The class registered as ``name``; an unknown name is a `ComponentError` that proposes the nearest one."""
    _import_builtin(kind)
    try:
        return _registered[kind][name]
    except KeyError:
        raise ComponentError(unknown(kind, name, _registered[kind])) from None


def build(kind: str, config: Config, *arguments: Any) -> Any:
    """The component of ``kind`` that ``config`` names, built from it and further arguments."""
    return get(kind, str(vars(config)["name"]))(config, *arguments)


def load_plugins(packages: Sequence[str]) -> None:
    """Import the packages that register a user's own components."""
    if not isinstance(packages, list | tuple) or not all(isinstance(package, str) for package in packages):
        raise ConfigError(f"plugins: expected a list of package names, got {packages!r}")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"plugins: cannot import {package!r}: {error}") from error


def component_config(kind: str, *, optional: bool = False) -> Any:
    """The annotation for a recipe's field that configures a component of ``kind``: ``{name: ..., **its Config}``, or null if optional."""

    def resolve(value: Any) -> Config | None:
        if isinstance(value, Config) or (optional and value is None):
            return value
        if not isinstance(value, dict) or "name" not in value:
            raise Problem((), f"expected a mapping with the key 'name', one of {', '.join(names(kind))}; got {value!r}")
        try:
            cls: Any = get(kind, str(value["name"]))
        except ComponentError as error:
            raise Problem(("name",), str(error)) from None
        return cast(Config, validate(cls.Config, value))

    if optional:
        return Annotated[SerializeAsAny[Config] | None, BeforeValidator(resolve)]
    return Annotated[SerializeAsAny[Config], BeforeValidator(resolve)]


def _import_builtin(kind: str) -> None:
    if kind not in KINDS:
        raise ComponentError(unknown("kind of component", kind, KINDS))
    for module in KINDS[kind]:
        importlib.import_module(module)
