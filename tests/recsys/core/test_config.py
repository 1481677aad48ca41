# SPDX-License-Identifier: Apache-2.0
"""What a user reads when a recipe or an override is wrong, and what a right one becomes."""

from pathlib import Path
from typing import Self

import pytest
from pydantic import Field, ValidationError, model_validator

from recsys.core.config import Config, apply_overrides, load_recipe, merge, parse, read_recipe, recipe_names
from recsys.core.errors import ConfigError, nearest, unknown


class Table(Config):
    name: str
    rows: int = Field(10, ge=1)


class Model(Config):
    blocks: int
    width: int = 64
    heads: int = 4
    tables: tuple[Table, ...] = ()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Recipe(Config):
    seed: int = 0
    model: Model
    other: Model | None = None
    named: dict[str, Table] = Field(default_factory=dict)
    plugins: tuple[str, ...] = ()


GOOD = {"seed": 1, "model": {"blocks": 2, "tables": [{"name": "a"}]}}


def fails(data: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Recipe, apply_overrides(data, overrides) if isinstance(data, dict) else data, source="my.yaml", overrides=overrides)
    return str(caught.value)


def test_a_right_recipe_is_built_and_frozen() -> None:
    recipe = parse(Recipe, GOOD, source="my.yaml")
    assert recipe.model.tables == (Table(name="a", rows=10),)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**GOOD, "sede": 1}, "my.yaml: sede: unknown key 'sede'; did you mean 'seed'?"),
        ({"model": {"blocks": 2, "widht": 3}}, "my.yaml: model.widht: unknown key 'widht'; did you mean 'width'?"),
        ({"model": {"blocks": 2, "tables": [{"name": "a"}, {"name": "b", "row": 1}]}}, "my.yaml: model.tables.1.row: unknown key 'row'"),
        ({**GOOD, "other": {"blocks": 2, "head": 1}}, "my.yaml: other.head: unknown key 'head'; did you mean 'heads'?"),
        ({**GOOD, "named": {"x": {"name": "a", "rowz": 1}}}, "my.yaml: named.x.rowz: unknown key 'rowz'; did you mean 'rows'?"),
    ],
)
def test_an_unknown_key_at_any_depth_names_the_file_the_key_and_the_nearest_one(data: dict, message: str) -> None:
    assert fails(data).startswith(message)


def test_an_unknown_key_lists_the_known_ones_of_its_section() -> None:
    assert fails({"model": {"blocks": 2, "zzz": 1}}) == "my.yaml: model.zzz: unknown key 'zzz' (known: blocks, heads, tables, width)"


def test_a_typo_of_a_required_key_is_told_as_a_typo() -> None:
    assert "unknown key 'bloks'; did you mean 'blocks'?" in fails({"model": {"bloks": 2}})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "my.yaml: model: is required, but missing"),
        ({"model": {}}, "my.yaml: model.blocks: is required, but missing"),
        ({"model": {"blocks": "many"}}, "my.yaml: model.blocks: Input should be a valid integer"),
        ({"model": {"blocks": 2.5}}, "got 2.5"),
        ({"model": {"blocks": 2, "tables": [{"name": "a", "rows": 0}]}}, "my.yaml: model.tables.0.rows: Input should be greater than"),
        ({"model": {"blocks": 2, "heads": 5}}, "my.yaml: model: Value error, width 64 is not a multiple of heads 5"),
        ({"model": 7}, "my.yaml: model: "),
        (["model"], "my.yaml: "),
    ],
)
def test_a_bad_value_names_the_file_the_key_and_what_was_expected(data: object, message: str) -> None:
    assert message in fails(data)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.bloks=4", "model.bloks"),
        ("model.blocks=many", "model.blocks"),
        ("modle.blocks=4", "modle"),
        ("model={}", "model.blocks"),
        ("model.heads=5", "model"),
        (" seed =x", "seed"),
    ],
)
def test_a_bad_override_is_blamed_itself(override: str, key: str) -> None:
    assert fails(GOOD, "plugins=[]", override).startswith(f"--set {override}: {key}: ")


def test_the_last_of_two_overrides_of_a_key_is_blamed() -> None:
    assert fails(GOOD, "seed=1", "seed=x").startswith("--set seed=x: ")


@pytest.mark.parametrize("override", ["model.head=1", "mod=1"])
def test_an_override_of_another_key_is_not_blamed(override: str) -> None:
    data = {"model": {"blocks": 2, "heads": "many"}}
    with pytest.raises(ConfigError, match=r"^my\.yaml: model\.heads: "):
        parse(Recipe, data, source="my.yaml", overrides=[override])


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["seed=7"], ("seed",), 7),
        (["model.width=1e2"], ("model", "width"), "1e2"),
        (["model.name=a=b"], ("model", "name"), "a=b"),
        (["model.tables=[{name: z}]"], ("model", "tables"), [{"name": "z"}]),
        (["other.blocks=1", "other.width=8"], ("other",), {"blocks": 1, "width": 8}),
        (["seed=1", "seed=2"], ("seed",), 2),
        (["seed="], ("seed",), None),
    ],
)
def test_overrides_are_yaml_and_the_last_holds(overrides: list[str], path: tuple[str, ...], value: object) -> None:
    node: object = apply_overrides(GOOD, overrides)
    for part in path:
        assert isinstance(node, dict)
        node = node[part]
    assert node == value


def test_overrides_do_not_change_what_they_are_applied_to() -> None:
    data = {"model": {"blocks": 2, "tables": [{"name": "a"}]}}
    result = apply_overrides(data, ["model.blocks=3"])
    result["model"]["tables"][0]["name"] = "z"
    assert data == {"model": {"blocks": 2, "tables": [{"name": "a"}]}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("model..width=3", "expected dotted.key=value"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("model.tables.0=3", "'tables' is a value, not a section"),
        ("seed=[1", "'[1' is not valid YAML"),
    ],
)
def test_a_malformed_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(GOOD, [override])
    assert str(caught.value) == f"--set {override}: {message}"


def test_recipe_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nmodel: {blocks: 2}\n")
    recipe = load_recipe(Recipe, str(file), ["model.width=128"])
    assert (recipe.seed, recipe.model.blocks, recipe.model.width) == (3, 2, 128)
    with pytest.raises(ConfigError, match=rf"{file}: model\.with: unknown key 'with'; did you mean 'width'\?"):
        file.write_text("model: {blocks: 2, with: 3}\n")
        load_recipe(Recipe, str(file))


@pytest.mark.parametrize("content", ["- a\n- b\n", "just words", "", "7"])
def test_a_recipe_that_is_not_a_mapping(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=rf"{file}: expected a mapping of keys, got (list|str|NoneType|int)"):
        read_recipe(str(file))


def test_a_recipe_that_is_not_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: [1\n")
    with pytest.raises(ConfigError, match=rf"{file}: not valid YAML: [^|]*line 2"):
        read_recipe(str(file))


def test_yaml_that_would_build_objects_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_recipe(str(file))


def test_an_unknown_recipe_names_the_nearest() -> None:
    assert "quickstart" in recipe_names()
    with pytest.raises(ConfigError, match="unknown recipe 'quikstart'; did you mean 'quickstart'"):
        read_recipe("quikstart")
    with pytest.raises(ConfigError, match=r"recipe 'no/such\.yaml': no such file"):
        read_recipe("no/such.yaml")


def write(folder: Path, **files: str) -> str:
    """Recipes that may extend each other by path, and the path of the last."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text.replace("BELOW", str(folder)))
    return str(folder / f"{name}.yaml")


def test_a_recipe_extends_another_key_by_key(tmp_path: Path) -> None:
    base = "a: {x: 1, y: {z: 2}}\nl: [1, 2]\nm: {name: one, k: 1}\n"
    middle = "extends: BELOW/base.yaml\na: {y: {w: 3}}\nl: [3]\n"
    top = "extends: BELOW/middle.yaml\na: {x: 5}\nm: {k: 2}\n"
    data, source = read_recipe(write(tmp_path, base=base, middle=middle, top=top))
    assert data == {"a": {"x": 5, "y": {"z": 2, "w": 3}}, "l": [3], "m": {"name": "one", "k": 2}}
    assert source.endswith("top.yaml")


def test_another_component_replaces_the_old_ones_keys() -> None:
    assert merge({"m": {"name": "one", "k": 1, "j": {"q": 1}}}, {"m": {"name": "two", "i": 1}}) == {"m": {"name": "two", "i": 1}}
    assert merge({"m": {"k": 1}}, {"m": {"name": "two"}}) == {"m": {"name": "two"}}
    assert merge({"m": {"kind": "a", "k": 1}}, {"m": {"kind": "a", "j": 2}}) == {"m": {"kind": "a", "k": 1, "j": 2}}


def test_recipes_that_extend_in_a_circle_or_nothing(tmp_path: Path) -> None:
    circle = write(tmp_path, one="extends: BELOW/two.yaml\n", two="extends: BELOW/one.yaml\n")
    with pytest.raises(ConfigError, match="goes round in a circle"):
        read_recipe(circle)
    with pytest.raises(ConfigError, match=r"extends: expected the name of a recipe or a path, got \[1\]"):
        read_recipe(write(tmp_path, three="extends: [1]\n"))
    with pytest.raises(ConfigError, match="unknown recipe 'quickstrt'; did you mean 'quickstart'"):
        read_recipe(write(tmp_path, four="extends: quickstrt\n"))


def test_every_shipped_recipe_is_a_mapping() -> None:
    for name in recipe_names():
        data, source = read_recipe(name)
        assert isinstance(data, dict) and source == f"{name}.yaml"


@pytest.mark.parametrize(("plugins", "shown"), [("mine", "'mine'"), ("[1]", "[1]"), ("", "None"), ("{a: 1}", "{'a': 1}")])
def test_plugins_that_are_not_a_list_of_names(tmp_path: Path, plugins: str, shown: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {{blocks: 2}}\nplugins: {plugins}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(Recipe, str(file))
    assert str(caught.value) == f"plugins: expected a list of package names, got {shown}"


def test_nearest() -> None:
    assert nearest("itme", ["item", "user"]) == "item"
    assert nearest("xyz", ["item", "user"]) is None
    assert unknown("key", "a", []) == "unknown key 'a' (known: none)"
