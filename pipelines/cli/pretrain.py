# SPDX-License-Identifier: Apache-2.0
"""`recsys pretrain RECIPE`: train a model over codes on several catalogues, to be used on others."""

import argparse
from pathlib import Path

from rich.console import Console

from recsys.core.config import load_recipe
from recsys.registry.location import home


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="recsys pretrain", description="Train on several catalogues; an interrupted training goes on.")
    parser.add_argument("recipe", help="a shipped recipe of a pre-training, such as pretrain_recgpt, or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key, as in training.trainer.epochs=3"
    )
    parser.add_argument("--home", type=Path, default=home(), help="the folder of results and caches (RECSYS_HOME)")
    arguments = parser.parse_args(argv)
    from pipelines.pretrain import PretrainRecipe, execute

    recipe = load_recipe(PretrainRecipe, arguments.recipe, arguments.overrides)
    console = Console()
    found = execute(recipe, arguments.home.resolve(), console)
    if found.history is None:
        console.print("there already")
    console.print(f"retriever.pretrained: {found.directory}", soft_wrap=True)
    return 0
