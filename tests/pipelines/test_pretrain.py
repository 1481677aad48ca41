# SPDX-License-Identifier: Apache-2.0
"""A model over codes is trained on two catalogues, and a run serves it on a third without training it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipelines import pretrain
from pipelines.cli import main
from pipelines.pretrain import Pretrained, PretrainRecipe, execute
from pipelines.recipe import Recipe
from pipelines.run import execute as run
from recsys import registry
from recsys.core.config import load_recipe
from recsys.core.errors import CheckpointError, ConfigError
from recsys.core.files import read_json
from recsys.retrieval.models import RecGPT
from recsys.retrieval.pretrained import from_pretrained
from tests.pipelines.small import SMALL

ONE = "{dataset: {name: synthetic}, columns: [title, genres]}"
TWO = "{dataset: {name: synthetic, items: 60, seed: 1}, columns: [title]}"
OWN = (
    f"domains={{one: {ONE}, two: {TWO}}}",
    "encoder={name: hashing}",
    "codes.tokenizer={name: fsq, slots: 4, levels: [5, 5], epochs: 2}",
    "model={name: recgpt, dim: 16, blocks: 1, heads: 2, max_length: 20}",
    "windows.stride=20",
    "training.trainer.epochs=2",
)
GATE = "gates=[{kind: bound, metric: parity.max_difference, at_most: 0.0001}]"


def recipe(*more: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, "pretrain_recgpt", (*OWN, *more))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pretrained]:
    home = tmp_path_factory.mktemp("home")
    return home, execute(recipe(), home, Console(quiet=True))


def test_what_was_finished_is_not_done_again_and_says_how_it_was_made(trained: tuple[Path, Pretrained]) -> None:
    home, found = trained
    assert found.history is not None and len(found.history.epochs) == 2
    assert execute(recipe(), home, Console(quiet=True)) == Pretrained(found.directory, None)
    notes = read_json(found.directory / "config.json")["notes"]
    assert notes["domains"] == ["one", "two"] and notes["recipe"]["training"]["trainer"]["epochs"] == 2
    assert all(0 <= row[f"ndcg@10.{name}"] <= 1 for row in notes["history"] for name in ("one", "two"))
    assert read_json(found.directory / "config.json")["levels"] == 4
    assert "validation NDCG@10" in found.directory.with_suffix(".svg").read_text()
    assert not list((home / "pretrained" / "training").iterdir())


@pytest.mark.parametrize(
    "training",
    ["null", pytest.param("{batch_size: 32, trainer: {epochs: 1, monitor: {metric: 'ndcg@10', mode: max}}}", marks=pytest.mark.slow)],
)
def test_a_run_serves_it_on_another_catalogue(training: str, trained: tuple[Path, Pretrained], tmp_path: Path) -> None:
    directory = trained[1].directory
    own = ("codes=null", f"retriever={{pretrained: {directory}, windows: {{stride: 20}}, training: {training}}}", GATE)
    small = [override for override in SMALL if not override.startswith("retriever.")]
    done = run(load_recipe(Recipe, "recgpt", (*small, *own)), tmp_path, Console(quiet=True))
    bundle = registry.load("models:/recsys@champion", done.location)
    assert isinstance(bundle.retriever, RecGPT) and bundle.tokenizer is not None
    assert bundle.tokenizer.fingerprint == read_json(directory / "config.json")["tokenizer"]
    assert len(done.results["served"]["known_user"]["items"]) == 10
    encoder = read_json(directory / "config.json")["encoder"]
    began, _, _ = from_pretrained(directory, replace(bundle.item_table, codes=None), encoder)
    same = all(torch.equal(value, began.state_dict()[name]) for name, value in bundle.retriever.state_dict().items())
    assert same == (training == "null")


def test_what_cannot_be_pretrained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model: expected a retriever that speaks in codes, got 'sasrec'"):
        execute(recipe("model={name: sasrec}"), tmp_path, Console(quiet=True))
    with pytest.raises(ConfigError, match="domains"):
        recipe("domains={}")


def test_the_command_says_where_the_model_stands(trained: tuple[Path, Pretrained], capsys: pytest.CaptureFixture[str]) -> None:
    home, found = trained
    settings = [argument for override in OWN for argument in ("--set", override)]
    assert main(["pretrain", "pretrain_recgpt", *settings, "--home", str(home)]) == 0
    assert f"there already\nretriever.pretrained: {found.directory}\n" in capsys.readouterr().out


def test_an_interrupted_training_goes_on_and_not_with_another_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_pretrained", stop)
        with pytest.raises(Stop):
            execute(recipe(), tmp_path, Console(quiet=True))
    fit = pretrain.fit_tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "fit_tokenizer", lambda codes, items, seed: fit(codes, items, seed + 1))
        with pytest.raises(CheckpointError, match="items"):
            execute(recipe(), tmp_path, Console(quiet=True))
    found = execute(recipe(), tmp_path, Console(quiet=True))
    assert found.history is not None and len(found.history.epochs) == 2
    whole = execute(recipe(), tmp_path / "other", Console(quiet=True))
    assert (found.directory / "model.safetensors").read_bytes() == (whole.directory / "model.safetensors").read_bytes()


def test_recipes_that_do_not_fit_what_is_pretrained_are_refused(trained: tuple[Path, Pretrained]) -> None:
    directory = trained[1].directory
    small = [override for override in SMALL if not override.startswith("retriever.")]

    def run_recipe(retriever: str, *more: str) -> Recipe:
        return load_recipe(Recipe, "recgpt", (*small, f"retriever={retriever}", *more))

    use = f"{{pretrained: {directory}, training: null}}"
    own = run_recipe(use, "codes=null")
    assert own.retriever.model.name == "recgpt" and own.retriever.pretrained == directory.resolve()
    for retriever, more, message in (
        (use, (), "codes: expected null, since the tokenizer comes with what is pretrained"),
        (f"{{model: {{name: recgpt, dim: 24}}, pretrained: {directory}, training: null}}", ("codes=null",), "model: expected null"),
        ("{training: null}", ("codes=null",), "model: expected a retriever, or a directory in pretrained"),
        ("{model: {name: recgpt}, training: null}", (), "training: expected how to train, since nothing is pretrained"),
        (
            use,
            ("codes=null", "index={name: beam, widths: [5, 5]}"),
            r"index.widths: expected 4, .* got \[5, 5\]",
        ),
        ("{pretrained: 5, training: null}", ("codes=null",), "pretrained"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_recipe(retriever, *more)
