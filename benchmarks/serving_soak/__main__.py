# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.serving_soak [--minutes 120]``: a soak of any length; interrupted, it tells what it has seen."""

import argparse
import sys

from rich.console import Console

from benchmarks.__main__ import show
from benchmarks.serving_soak import MINUTES, soak

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long (default: %(default)g)")
    show(soak(parser.parse_args().minutes), Console(width=None if sys.stdout.isatty() else 140))
