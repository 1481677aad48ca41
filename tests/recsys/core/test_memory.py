# SPDX-License-Identifier: Apache-2.0
"""Whether freed memory is kept, counted in page faults, each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

from recsys.core.memory import ENV, keep_freed_memory

FAULTS = """
import resource
import torch
from recsys.core.memory import give_back_memory, keep_freed_memory

kept = keep_freed_memory()

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(12 << 20).fill_(1.0)  # 48 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fill(), fill()
again = fill()
give_back_memory()
print(int(kept), again, fill())
"""


def faults(**settings: str) -> tuple[bool, int, int]:
    """Whether memory is kept, and the page faults of five tensors of 48 MiB, 61,440 pages, after such ones, and after giving all back."""
    environment = {name: value for name, value in os.environ.items() if name != ENV} | settings
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    kept, again, after = map(int, done.stdout.split())
    return bool(kept), again, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    kept, again, after = faults()
    assert kept
    assert again < 20 < after  # on huge pages one of the five has 24 of them, on others 12,288


def test_the_environment_has_the_last_word() -> None:
    kept, again, _ = faults(RECSYS_KEEP_MEMORY="0")
    assert not kept
    assert again > 100 or platform.libc_ver()[0] != "glibc"


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
