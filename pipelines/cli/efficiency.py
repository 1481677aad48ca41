# SPDX-License-Identifier: Apache-2.0
"""`recsys efficiency RECIPE`: ask a trained retriever with less and less of each history, and say what that saves and costs."""

import argparse
from pathlib import Path

from rich.console import Console

from recsys.registry.location import home


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="recsys efficiency",
        description="Train once, then measure methods at several budgets beside the last, the most popular and random events. "
        "An interrupted study goes on.",
    )
    parser.add_argument("recipe", help="a shipped recipe of a trade-off study, such as efficiency_movielens_1m, or a YAML file")
    parser.add_argument("--quick", action="store_true", help="the recipe's quick settings: minutes, and nothing to conclude from")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a key, as in budgets=[0.5]"
    )
    parser.add_argument("--home", type=Path, default=home(), help="the folder of runs (RECSYS_HOME)")
    arguments = parser.parse_args(argv)
    from pipelines.efficiency import EfficiencyRecipe, execute, show
    from pipelines.study import QUICK, load

    recipe = load(EfficiencyRecipe, arguments.recipe, arguments.overrides, quick=arguments.quick)
    directory = arguments.home / "efficiency" / (recipe.name + (QUICK if arguments.quick else ""))
    console = Console()
    lines, best = execute(recipe, directory, console)
    show(lines, best, console)
    console.print(f"report: {directory / 'report.html'}")
    return 0
