# SPDX-License-Identifier: Apache-2.0
"""`recsys dagster RECIPE`: the steps of a recipe in Dagster's web UI."""

import argparse
from pathlib import Path

from recsys.core.config import load_recipe, recipe_names
from recsys.registry.location import home


def main(argv: list[str]) -> int:
    """The command; it ends when it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="recsys dagster", description="Show a recipe's steps in Dagster's web UI, and run them from there."
    )
    parser.add_argument("recipe", help=f"one of {', '.join(recipe_names())}, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key of the recipe")
    parser.add_argument("--home", type=Path, default=home(), help="the folder of results, registry and online stores (RECSYS_HOME)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default %(default)s: this machine only)")
    parser.add_argument("--port", type=int, default=3000, help="default %(default)s")
    arguments = parser.parse_args(argv)
    from pipelines.orchestration.serve import serve
    from pipelines.recipe import Recipe

    load_recipe(Recipe, arguments.recipe, arguments.overrides)  # what is wrong with it is said here, and not in a log of Dagster's
    serve(arguments.recipe, arguments.overrides, arguments.home, arguments.host, arguments.port)
