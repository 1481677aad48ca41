# SPDX-License-Identifier: Apache-2.0
"""Which modules are a piece of code, and which edits are another version of it."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

from pipelines.graph.code import Code
from pipelines.graph.digests import digests
from pipelines.graph.parts import files_of, modules_of, plain
from pipelines.graph.step import StepError
from recsys.core.config import Config, load_recipe
from recsys.core.files import sha256_file
from recsys.data.datasets.ingested import Ingested

FILES = {
    "app/__init__.py": "",
    "app/step.py": "from app.deep import inner\nimport app.other as o, numpy\ndef f():\n    from .lazy import g\n",
    "app/lazy.py": "def g():\n    return 1\n",
    "app/other.py": '"""Text."""\n# note\nX = 1\n',
    "app/deep/__init__.py": "from ..base import B\n",
    "app/deep/inner.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import app.types\nelse:\n    import app.real\n",
    "app/base.py": "B = 1\n",
    "app/types.py": "T = 1\n",
    "app/real.py": "R = 1\n",
    "app/alone.py": "import app.step\n",
}
CLOSURE = ["app", "app.base", "app.deep", "app.deep.inner", "app.lazy", "app.other", "app.real", "app.step"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def version(root: Path, *modules: str) -> str:
    return Code({"app": root / "app"}).version(modules or ("app.step",))


def test_the_closure_is_all_that_runs_when_a_module_is_imported(root: Path) -> None:
    assert Code({"app": root / "app"}).closure(["app.step"]) == CLOSURE


@pytest.mark.parametrize("module", CLOSURE)
def test_an_edit_of_any_of_them_is_another_version(module: str, root: Path) -> None:
    before = version(root)
    file = next(file for file in FILES if file.removesuffix(".py").removesuffix("/__init__").replace("/", ".") == module)
    (root / file).write_text((root / file).read_text() + "Z = 2\n")
    assert version(root) != before


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("app/other.py", '"""Another text,\nlonger."""\n\n\n# another note\nX  =  1  # here, too\n"""After a value."""\n'),
        ("app/lazy.py", 'def g():\n    """A docstring."""\n    return (1)\n'),
        ("app/types.py", "T = 2\n"),
        ("app/alone.py", "import app.step\nY = 1\n"),
    ],
)
def test_comments_docstrings_layout_and_other_modules_do_not_count(file: str, text: str, root: Path) -> None:
    before = version(root)
    (root / file).write_text(text)
    assert version(root) == before


def test_more_modules_are_another_version(root: Path) -> None:
    assert version(root, "app.step", "app.alone") != version(root)


def test_what_has_no_source_or_is_not_python_is_an_error(root: Path) -> None:
    with pytest.raises(StepError, match=r"no source of the module 'app\.none'"):
        version(root, "app.none")
    (root / "app/base.py").write_text("B = \n")
    with pytest.raises(StepError, match=r"base\.py"):
        version(root)


def test_this_project_is_found_without_importing_it() -> None:
    code = Code()
    ranking = code.closure(["recsys.ranking.models.unimixer"])
    assert {"recsys.ranking.models.unimixer", "recsys.core.config", "recsys.ranking"} <= set(ranking)
    assert not [name for name in ranking if name.startswith(("recsys.retrieval.models", "feature_store", "pipelines"))]


def test_a_component_of_a_plugin_is_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "plugged.py"
    source.write_text("from recsys.core.config import Config\nclass Own(Config):\n    name: str = 'own'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import plugged  # type: ignore[import-not-found]

    found = modules_of({"ranker": [plugged.Own()], "n": 1})
    assert found == {"plugged"}
    before = Code().version(found)
    source.write_text(source.read_text() + "X = 1\n")
    assert Code().version(found) != before
    del sys.modules["plugged"]


def test_a_recipe_names_the_modules_of_its_components() -> None:
    from pipelines.recipe import Recipe

    recipe = load_recipe(Recipe, "quickstart", ["dataset={name: synthetic}"])
    found = modules_of({"ranker": recipe.ranker, "seed": recipe.seed})
    assert {"recsys.ranking.models.tokenmixer_large", "recsys.ranking.tokenizers.groups", "recsys.ranking.history.attention"} <= found
    assert not [name for name in found if name.startswith("recsys.retrieval")]


def test_paths_in_a_recipe_are_followed_to_their_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one").write_text("1")
    (folder / ".hidden").write_text("x")
    config = Ingested.Config(path=folder)
    before = files_of({"dataset": config})
    assert set(before) == {"data/one"}
    (folder / "one").write_text("2")
    assert files_of({"dataset": config}) != before
    assert files_of({"dataset": Ingested.Config(path=tmp_path / "none")}) == {}


def test_a_file_is_read_once_as_long_as_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []
    monkeypatch.setattr("pipelines.graph.digests.sha256_file", lambda file: read.append(file) or sha256_file(file))
    file, young = tmp_path / "old", tmp_path / "young"
    for path in (file, young):
        path.write_text("1")
    os.utime(file, (1e9, 1e9))
    first = digests([file, young])
    assert digests([file, young]) == first == dict.fromkeys((file, young), hashlib.sha256(b"1").hexdigest())
    assert read == [file, young, young], "what was changed just now may change again unnoticed"
    file.write_text("2")
    os.utime(file, (1e9, 1e9 + 1))
    assert digests([file])[file] == hashlib.sha256(b"2").hexdigest()
    (tmp_path / "cache" / "digests.json").write_text("{")
    assert digests([file])[file] == hashlib.sha256(b"2").hexdigest()


def test_what_is_not_plain_cannot_enter_a_key() -> None:
    class Own(Config):
        n: int = 1

    assert plain({"a": (Own(), Path("x"), None, [1.5, True])}) == {"a": [{"n": 1}, "x", None, [1.5, True]]}
    with pytest.raises(StepError, match="set cannot enter a key"):
        plain({"a": {1}})
