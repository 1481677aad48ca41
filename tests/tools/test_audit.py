# SPDX-License-Identifier: Apache-2.0
"""An audit tells what is known, what could not be looked up, and which of the two fails it."""

from pathlib import Path
from typing import Any

import pytest

from tools.audit import Audit, main

GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "X-1", "fix_versions": ["2.1", "3.0"], "aliases": [], "description": ""}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("dependencies", "status", "strict"),
    [([GOOD], 0, 0), ([GOOD, BAD], 1, 1), ([GOOD, UNKNOWN], 0, 1), ([UNKNOWN, BAD], 1, 1)],
)
def test_a_known_vulnerability_fails_it_and_an_unknown_package_only_where_asked(dependencies: Any, status: int, strict: int) -> None:
    found = Audit.of({"dependencies": dependencies, "fixes": []})
    assert (found.status(False), found.status(True)) == (status, strict)
    told = "\n".join(found.lines())
    assert ("bad 2.0: X-1, mended in 2.1, 3.0" in told) == (BAD in dependencies)
    assert ("NOT AUDITED: 1 packages" in told) == (UNKNOWN in dependencies)
    looked_up = len([each for each in dependencies if each is not UNKNOWN])
    assert f"in {looked_up} packages that were looked up" in told


def test_offline_it_says_that_nothing_was_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The real pip-audit, behind a proxy that nobody listens on."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    requirements = tmp_path / "pinned.txt"
    requirements.write_text("numpy==2.4.6\n")
    assert main([str(requirements)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("NOT AUDITED: ") and "known vulnerabilities in" not in told
    assert main(["--strict", str(requirements)]) == 1


def test_a_file_that_is_not_there_is_no_clean_audit(tmp_path: Path, capsys: Any) -> None:
    assert main([str(tmp_path / "absent.txt"), "--strict"]) == 1
    assert "NOT AUDITED" in capsys.readouterr().out
