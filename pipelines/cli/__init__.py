# SPDX-License-Identifier: Apache-2.0
"""The command line: ``recsys VERB ...``. A verb is the module ``pipelines/cli/<verb>.py``, imported only when it is called.

Each offers ``main(argv: list[str]) -> int``, the exit status. This module stays light, so that help answers at once and
``recsys doctor`` works where torch does not.
"""

import os
import sys
from importlib import import_module, metadata

from recsys.core.errors import RecsysError, unknown

VERBS = {
    "run": "run a recipe: from raw events to a promoted bundle, with a report",
    "step": "run one step of a recipe and what it needs, for some days or all; or say what is there, and why the rest is not",
    "dagster": "show the steps of a recipe in Dagster's web UI: runs, days, backfills, schedule",
    "train": "train a recipe's ranker or a retriever, in one process or in several",
    "pretrain": "train a model over codes on several catalogues, to be used on others",
    "scale": "train models at many sizes and fit scaling laws, with a picture",
    "efficiency": "ask a trained retriever with less of each history, and say what that saves and costs",
    "ingest": "turn raw files into a data set, counting what was dropped",
    "features": "audit what was served, or join features to a log that does not fit in memory",
    "replay": "compute recorded decisions again, and say how far the results are apart",
    "feedback": "join feedback with decisions: labelled impressions, each exactly once",
    "forget": "erase a user from online stores, logs and data sets",
    "serve": "answer requests over HTTP with the champion",
    "promote": "move a registered version on: to champion, canary or shadow, or back",
    "rollback": "make the previous champion the champion again",
    "history": "print the promotion log",
    "gc": "remove the bundles, online stores and caches that nothing refers to",
    "doctor": "say what is installed, whether it fits together, and how to mend what does not",
}

BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status.

    A `RecsysError` is one line on stderr and status 2; with ``RECSYS_DEBUG=1`` it is a traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(metadata.version("recsys-scaling"))
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _fail(unknown("verb", verb, VERBS))
    try:
        return _run(verb, rest)
    except RecsysError as error:
        if _debugging():
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        if _debugging():
            raise
        return INTERRUPTED


def _run(verb: str, rest: list[str]) -> int:
    try:
        module = import_module(f"{__name__}.{verb}")
    except (ImportError, OSError) as error:  # a library that is absent (the first) or does not load (the second)
        if _debugging():
            raise
        return _fail(f"{verb}: {type(error).__name__}: {error}: recsys doctor says what is wrong")
    return int(module.main(rest))


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return f"usage: recsys VERB [options]\n\n{verbs}\n\nrecsys VERB --help lists the options of one. RECSYS_DEBUG=1 shows tracebacks."


def _debugging() -> bool:
    return os.environ.get("RECSYS_DEBUG") == "1"


def _fail(message: str) -> int:
    line = f"recsys: {' '.join(message.split())}"
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[31m{line}\033[0m" if colour else line, file=sys.stderr)
    return BAD_INPUT
