# SPDX-License-Identifier: Apache-2.0
"""Look for known vulnerabilities of pinned packages with pip-audit, and say how many could be looked up.

The exit status is 1 where one is known. Where the advisories cannot be reached, or do not know a package, that is told and is no failure,
unless ``--strict`` asks for every package to be looked up; pip-audit alone calls packages that it could not look up free of known
vulnerabilities, and fails where it is offline.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VULNERABLE = 1


@dataclass(frozen=True)
class Audit:
    """What pip-audit found.

    Attributes:
        known: vulnerabilities, a line for each.
        looked_up: packages that were.
        skipped: packages that were not.
        problem: why nothing could be looked up at all; None where something was.
    """

    known: tuple[str, ...]
    looked_up: int
    skipped: tuple[str, ...]
    problem: str | None = None

    @classmethod
    def of(cls, report: Any) -> "Audit":
        """From pip-audit's JSON."""
        found = [each for each in report["dependencies"] if "skip_reason" not in each]
        known = [(each, flaw) for each in found for flaw in each["vulns"]]
        lines = (
            f"{each['name']} {each['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version'}"
            for each, flaw in known
        )
        return cls(tuple(lines), len(found), tuple(each["name"] for each in report["dependencies"] if "skip_reason" in each))

    def status(self, strict: bool) -> int:
        """The exit status."""
        unknown = self.problem is not None or bool(self.skipped)
        return VULNERABLE if self.known or (strict and unknown) else 0

    def lines(self) -> list[str]:
        """What a person is told."""
        if self.problem is not None:
            return [f"NOT AUDITED: {self.problem}"]
        missing = [
            f"NOT AUDITED: {len(self.skipped)} packages that the advisories do not list, such as {name}" for name in self.skipped[:1]
        ]
        return [*self.known, *missing, f"{len(self.known)} known vulnerabilities in {self.looked_up} packages that were looked up"]


def audit(requirements: Path) -> Audit:
    """Audit the packages that a file pins."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        return Audit.of(json.loads(done.stdout))
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"pip-audit ended with status {done.returncode}"]
        return Audit((), 0, (), lines[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", type=Path, help="a file of pinned packages")
    parser.add_argument("--strict", action="store_true", help="fail where a package could not be looked up")
    given = parser.parse_args(arguments)
    found = audit(given.requirements)
    print("\n".join(found.lines()))
    return found.status(given.strict)


if __name__ == "__main__":
    sys.exit(main())
