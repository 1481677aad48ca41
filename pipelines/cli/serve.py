# SPDX-License-Identifier: Apache-2.0
"""`recsys serve`: the server is a program of its own, and this one becomes it."""

import os
import sys


def main(argv: list[str]) -> int:
    """Replace this process by ``python -m serving`` with the same arguments."""
    os.execv(sys.executable, [sys.executable, "-m", "serving", *argv])
