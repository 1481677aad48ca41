# SPDX-License-Identifier: Apache-2.0
"""`recsys run RECIPE`: from raw events to a promoted, served bundle and a report."""

import argparse
from pathlib import Path

from rich.console import Console

from recsys.core.config import load_recipe, recipe_names
from recsys.registry.location import home


def main(argv: list[str]) -> int:
    """The command; the status is 1 where a gate failed, with the report written all the same."""
    parser = argparse.ArgumentParser(prog="recsys run", description="Run a recipe.")
    parser.add_argument("recipe", help=f"one of {', '.join(recipe_names())}, or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key, as in ranker.model.blocks=4"
    )
    parser.add_argument("--home", type=Path, default=home(), help="the folder of runs, registry and online stores (RECSYS_HOME)")
    parser.add_argument("--resume", type=Path, metavar="DIRECTORY", help="write into the directory of an earlier run of the same recipe")
    arguments = parser.parse_args(argv)
    from pipelines.recipe import Recipe

    recipe = load_recipe(Recipe, arguments.recipe, arguments.overrides)
    from pipelines.run import execute, promoted
    from pipelines.show import show

    console = Console()
    run = execute(recipe, arguments.home, console, arguments.resume)
    show(run.results, console)
    console.print(f"report: {run.directory / 'report.html'}")
    return 0 if promoted(run) else 1
