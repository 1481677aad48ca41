# SPDX-License-Identifier: Apache-2.0
"""`recsys doctor`: what is installed, whether it fits together, what it can do on this machine, and how to mend the rest."""

import argparse
import json

from pipelines.doctor.examine import PARTS, examine
from pipelines.doctor.show import show


def main(argv: list[str]) -> int:
    """The command; status 1 where something required is broken."""
    description = "Try each library in a process of its own, and name the command that mends each problem."
    parser = argparse.ArgumentParser(prog="recsys doctor", description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], metavar="PART", help=f"look at some of: {', '.join(PARTS)}")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that each library has (default %(default)g)")
    arguments = parser.parse_args(argv)
    report = examine(arguments.only, timeout=arguments.timeout)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(report)
    return 0 if report.ok else 1
