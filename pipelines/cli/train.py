# SPDX-License-Identifier: Apache-2.0
"""`recsys train RECIPE --nproc N`: one of a recipe's models, trained in several processes, and whatever its training needs."""

from pipelines.cli import step

MODELS = ("ranker", "retriever", "collaborative")


def main(argv: list[str]) -> int:
    """The command: that of `recsys step MODEL`, with the recipe as it is given to `recsys run`."""
    if argv and not argv[0].startswith("-"):
        argv = ["--recipe", *argv]
    parser = step.options("recsys train RECIPE", "Train one of a recipe's models and make what it needs, except what is there.")
    parser.add_argument("--model", choices=MODELS, default="ranker", help="which of the recipe's models (default %(default)s)")
    arguments = parser.parse_args(argv)
    return step.run(arguments, arguments.model)
