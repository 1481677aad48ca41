# SPDX-License-Identifier: Apache-2.0
"""`recsys serve`: the server is a program of its own, and this one becomes it."""

import argparse
import os
import sys
from importlib.util import find_spec

from recsys.core.errors import ConfigError

PROGRAMS = {"local": "serving", "ray": "serving.deploy"}
"""The module that serves, by engine."""


def main(argv: list[str]) -> int:
    """Replace this process by ``python -m serving``, or by the program of another engine, with the same arguments.

    Raises:
        ConfigError: Ray is asked for and not installed.
    """
    parser = argparse.ArgumentParser(prog="recsys serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--engine", choices=tuple(PROGRAMS), default="local")
    chosen, rest = parser.parse_known_args(argv)
    if chosen.engine == "ray" and find_spec("ray") is None:
        raise ConfigError("engine: ray: it is not installed; install it with pip install 'recsys-scaling[ray]', or use the engine local")
    os.execv(sys.executable, [sys.executable, "-m", PROGRAMS[chosen.engine], *rest])
