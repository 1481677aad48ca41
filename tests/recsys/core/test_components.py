# SPDX-License-Identifier: Apache-2.0
"""Registration, lookup, recipes that choose a component by name, and a user's own plugins."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest

from recsys.core import components
from recsys.core.components import component_config, get, load_plugins, names, register
from recsys.core.config import Config, load_recipe, parse
from recsys.core.errors import ComponentError, ConfigError


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds without built-in components."""
    monkeypatch.setattr(components, "KINDS", {"mixer": (), "ranker": ()})
    monkeypatch.setattr(components, "_registered", {"mixer": {}, "ranker": {}})


def mixer(named: str, module: str = __name__) -> Any:
    """A class that could be registered as ``named``."""

    class Mixer:
        class Config(Config):
            name: Literal["fourier", "shuffle"] = named  # type: ignore[assignment]
            width: int
            depth: int = 1

    Mixer.__module__ = module
    return Mixer


def test_a_registered_class_is_found_by_its_name() -> None:
    fourier, shuffle = register("mixer", "fourier")(mixer("fourier")), register("mixer", "shuffle")(mixer("shuffle", "other"))
    assert get("mixer", "fourier") is fourier and get("mixer", "shuffle") is shuffle
    assert names("mixer") == ["fourier", "shuffle"] and names("ranker") == []


def test_a_class_without_a_config_is_refused() -> None:
    with pytest.raises(ComponentError, match=r"Bare: a component needs a nested class Config"):

        @register("mixer", "bare")
        class Bare: ...

    with pytest.raises(ComponentError, match=r"Foreign: a component needs a nested class Config\(recsys.core.config.Config\)"):

        @register("mixer", "foreign")
        class Foreign:
            class Config:
                name = "foreign"

    assert names("mixer") == []


def test_a_config_with_another_name_is_refused() -> None:
    with pytest.raises(ComponentError, match=r"Mixer\.Config: expected the field `name: Literal\['fast'\] = 'fast'`"):
        register("mixer", "fast")(mixer("fourier"))
    with pytest.raises(ComponentError, match="expected the field `name"):

        @register("mixer", "nameless")
        class Nameless:
            class Config(Config):
                width: int


def test_a_name_is_taken_once() -> None:
    first = register("mixer", "fourier")(mixer("fourier", "first"))
    with pytest.raises(ComponentError, match=r"mixer 'fourier' is registered twice: by first\.mixer\.\S*Mixer and second\.mixer\.\S*Mixer"):
        register("mixer", "fourier")(mixer("fourier", "second"))
    assert get("mixer", "fourier") is first


def test_a_name_is_taken_once_within_one_module() -> None:
    register("mixer", "fourier")(mixer("fourier"))
    copied = mixer("fourier")
    copied.__qualname__ = "Copied"
    with pytest.raises(ComponentError, match="registered twice"):
        register("mixer", "fourier")(copied)


def test_a_module_that_is_loaded_anew_registers_again() -> None:
    register("mixer", "fourier")(mixer("fourier"))
    again = register("mixer", "fourier")(mixer("fourier"))
    assert get("mixer", "fourier") is again


def test_an_unknown_name_proposes_the_nearest() -> None:
    register("mixer", "fourier")(mixer("fourier"))
    with pytest.raises(ComponentError, match=r"unknown mixer 'furier'; did you mean 'fourier'\? \(known: fourier\)"):
        get("mixer", "furier")


@pytest.mark.parametrize("ask", [lambda: get("mixr", "x"), lambda: names("mixr"), lambda: register("mixr", "x")])
def test_an_unknown_kind_proposes_the_nearest(ask: Any) -> None:
    with pytest.raises(ComponentError, match="unknown kind of component 'mixr'; did you mean 'mixer'"):
        ask()


class Recipe(Config):
    mixer: component_config("mixer")  # type: ignore[valid-type]
    more: tuple[component_config("mixer"), ...] = ()  # type: ignore[valid-type]
    plugins: tuple[str, ...] = ()


def fails(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, data, source="my.yaml")
    return str(caught.value)


def test_a_recipe_gets_the_config_of_the_component_that_it_names() -> None:
    cls = register("mixer", "fourier")(mixer("fourier"))
    recipe = parse(Recipe, {"mixer": {"name": "fourier", "width": 8}, "more": [{"name": "fourier", "width": 9}]}, source="my.yaml")
    assert recipe.mixer == cls.Config(width=8) and type(recipe.mixer) is cls.Config
    assert recipe.more == (cls.Config(width=9),)
    assert recipe.model_dump()["mixer"] == {"name": "fourier", "width": 8, "depth": 1}  # the fields of the chosen class, not of the base
    assert parse(Recipe, recipe.model_dump(), source="again") == recipe
    assert Recipe(mixer=cls.Config(width=8)).mixer == cls.Config(width=8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixer": {"name": "fourier", "widht": 8}}, "my.yaml: mixer.widht: unknown key 'widht'; did you mean 'width'?"),
        ({"mixer": {"name": "furier"}}, "my.yaml: mixer.name: unknown mixer 'furier'; did you mean 'fourier'?"),
        ({"mixer": {"name": "fourier"}}, "my.yaml: mixer.width: is required, but missing"),
        ({"mixer": {"name": "fourier", "width": "x"}}, "my.yaml: mixer.width: Input should be a valid integer"),
        ({"mixer": "fourier"}, "my.yaml: mixer: expected a mapping with the key 'name', one of fourier; got 'fourier'"),
        ({"mixer": {"width": 8}}, "my.yaml: mixer: expected a mapping with the key 'name', one of fourier"),
        (
            {"mixer": {"name": "fourier", "width": 8}, "more": [{"name": "fourier", "width": 8, "dept": 2}]},
            "my.yaml: more.0.dept: unknown key 'dept'; did you mean 'depth'?",
        ),
    ],
)
def test_a_wrong_component_names_the_file_the_key_and_the_nearest(data: dict[str, Any], message: str) -> None:
    register("mixer", "fourier")(mixer("fourier"))
    assert fails(data).startswith(message)


PLUGIN = """
from typing import Literal
from recsys.core.components import register
from recsys.core import config

@register("mixer", "fourier")
class Fourier:
    class Config(config.Config):
        name: Literal["fourier"] = "fourier"
        width: int
"""


def test_a_recipe_loads_the_plugins_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_of_a_user.py").write_text(PLUGIN)
    (tmp_path / "mine.yaml").write_text("plugins: [plugin_of_a_user]\nmixer: {name: fourier, width: 4}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        recipe = load_recipe(Recipe, str(tmp_path / "mine.yaml"))
        assert get("mixer", "fourier").__module__ == "plugin_of_a_user" and recipe.mixer.width == 4
    finally:
        sys.modules.pop("plugin_of_a_user", None)


def test_a_plugin_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match="plugins: cannot import 'no_such_plugin': No module named 'no_such_plugin'"):
        load_plugins(["no_such_plugin"])


def test_every_kind_of_the_framework_has_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for kind, modules in components.KINDS.items():
        assert names(kind), kind
        for name in names(kind):
            assert get(kind, name).Config.model_fields["name"].default == name
        assert all(import_module(module) for module in modules)
