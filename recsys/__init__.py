# SPDX-License-Identifier: Apache-2.0
"""Rankers and retrievers that scale, and the road from events to an answered request.

Importing any part of the package asks PyTorch for huge pages under large tensors on the CPU, by the environment variable
``THP_MEM_ALLOC_ENABLE`` where it is not set. PyTorch reads it when it makes its first tensor. Without it the system gives every tensor of
32 MiB or more fresh pages of 4 KiB and zeroes each in a page fault of its own, and a training step can take 1.7 times as long.
``THP_MEM_ALLOC_ENABLE=0`` turns it off.
"""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
