# SPDX-License-Identifier: Apache-2.0
"""Memory on the CPU: that of freed tensors is kept for the next ones while a model trains; and how much there is.

glibc gives every block of 32 MiB or more back to the system as soon as it is freed, and the system zeroes each page anew when it is touched
next. A training step frees and asks for the same blocks again and again, and a fifth of its time and more can go that way.
"""

import ctypes
import os
import platform
from pathlib import Path

ENV = "RECSYS_KEEP_MEMORY"
# Of mallopt: how many blocks stand outside the heap, and from which size on the end of the heap is given back.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> bool:
    """From now on, keep freed memory in this process, whatever its size; `give_back_memory` says when not.

    Returns:
        Whether that is so: not with another C library than glibc, nor with ``RECSYS_KEEP_MEMORY=0``.
    """
    if not _glibc() or os.environ.get(ENV) == "0":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))


def give_back_memory() -> None:
    """Give what is free back to the system. Blocks of changing sizes leave holes that nothing fills, so that this is due now and then."""
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """The memory that this process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
