# SPDX-License-Identifier: Apache-2.0
"""`recsys scale RECIPE`: train models at many sizes, fit power laws, and write them with a picture; or lay a large ranker out on paper."""

import argparse
from pathlib import Path

from rich.console import Console

from recsys.registry.location import home


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="recsys scale", description="Sweep sizes and fit scaling laws; an interrupted sweep goes on.")
    parser.add_argument("recipe", help="a shipped recipe of a scaling study, such as scaling_planted, or a YAML file")
    parser.add_argument(
        "--paper", action="store_true", help="build the recipe's model (such as tokenmixer_large_7b) without memory, and say what it takes"
    )
    parser.add_argument("--axis", choices=("params", "flops", "data"), default="params", help="what grows (params)")
    parser.add_argument("--quick", action="store_true", help="the recipe's quick settings: minutes, and nothing to conclude from")
    parser.add_argument("--only", action="append", default=[], metavar="LABEL", help="only these architectures")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key, as in rows=100000"
    )
    parser.add_argument("--home", type=Path, default=home(), help="the folder of runs (RECSYS_HOME)")
    arguments = parser.parse_args(argv)
    if arguments.paper:
        return _paper(arguments.recipe, arguments.overrides)
    from pipelines.scale import execute, load_scale_recipe, show
    from pipelines.study import QUICK

    recipe = load_scale_recipe(arguments.recipe, arguments.overrides, quick=arguments.quick)
    directory = arguments.home / "scale" / (recipe.name + (QUICK if arguments.quick else ""))
    console = Console()
    study = execute(recipe, arguments.axis, directory, console, arguments.only)
    show(study, console)
    console.print(f"report: {directory / 'report.html'}")
    return 0


def _paper(name: str, overrides: list[str]) -> int:
    from recsys.core.config import load_recipe
    from recsys.scaling.communication import PLACEMENTS, table
    from recsys.scaling.paper import PaperRecipe, on_paper, page, workload

    recipe = load_recipe(PaperRecipe, name, overrides)
    print(page({recipe.name: (recipe, on_paper(recipe))}))
    print(table(workload(recipe), tuple(2**n for n in range(3, 11)), PLACEMENTS), end="")
    return 0
