# SPDX-License-Identifier: Apache-2.0
"""Large tensors stand on huge pages, counted in page faults, each in a process of its own: the setting is read once."""

import os
import subprocess
import sys
from pathlib import Path

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COUNT = """
import os, resource
import torch
import recsys

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(12 << 20).fill_(1.0)  # 48 MiB
print(os.environ["THP_MEM_ALLOC_ENABLE"], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count(**settings: str) -> tuple[str, int]:
    """The value of the switch, and the page faults of five tensors of 48 MiB: 61,440 pages of 4 KiB."""
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"} | settings
    done = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True, env=environment)
    switch, faults = done.stdout.split()
    return switch, int(faults)


def test_large_tensors_fault_once_for_each_huge_page() -> None:
    switch, faults = count()
    assert switch == "1"
    if _SYSTEM.is_file() and "[never]" not in _SYSTEM.read_text():
        assert faults < 61_440 / 4


def test_the_environment_has_the_last_word() -> None:
    switch, faults = count(THP_MEM_ALLOC_ENABLE="0")
    assert switch == "0"
    if _SYSTEM.is_file() and "[madvise]" in _SYSTEM.read_text():
        assert faults > 50_000
