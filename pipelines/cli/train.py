# SPDX-License-Identifier: Apache-2.0
"""`recsys train RECIPE --nproc N`: the ranker of a recipe, trained in several processes, and whatever its training needs."""

from pipelines.cli import step


def main(argv: list[str]) -> int:
    """The command: that of `recsys step ranker`, with the recipe as it is given to `recsys run`."""
    if argv and not argv[0].startswith("-"):
        argv = ["--recipe", *argv]
    return step.main(["ranker", *argv])
