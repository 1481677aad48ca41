# SPDX-License-Identifier: Apache-2.0
"""The native search, through ctypes."""

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import native

LANES = 16  # users whose numbers lie in one register
_SOURCE = Path(__file__).with_name("cpu.cpp")


def available() -> bool:
    """Whether there is a native search on this machine; compiles it where it has not been."""
    return native.load(_SOURCE) is not None


def search(
    weights_vb: Tensor, bags_nk: Tensor, k: int, rows: np.ndarray | None, excluded_offsets: np.ndarray, excluded_rows: np.ndarray
) -> np.ndarray:
    """See `kernels.gather_topk.gather_topk`; only where `available`."""
    library, users = native.load(_SOURCE), weights_vb.shape[1]
    assert library is not None
    weights = functional.pad(weights_vb, (0, -users % LANES)).unflatten(1, (-1, LANES)).transpose(0, 1).contiguous()  # [groups, V, LANES]
    out = np.zeros((users, k), np.uint64)
    if users and k:
        library.gather_topk(
            ctypes.c_void_p(weights.data_ptr()),
            ctypes.c_int64(weights.shape[1]),
            ctypes.c_int64(weights.shape[0]),
            ctypes.c_int64(users),
            ctypes.c_void_p(bags_nk.data_ptr()),
            ctypes.c_int64(bags_nk.shape[1]),
            None if rows is None else ctypes.c_void_p(rows.ctypes.data),
            ctypes.c_int64(len(bags_nk) if rows is None else len(rows)),
            ctypes.c_void_p(excluded_offsets.ctypes.data) if len(excluded_rows) else None,
            ctypes.c_void_p(excluded_rows.ctypes.data) if len(excluded_rows) else None,
            ctypes.c_int64(k),
            ctypes.c_int64(torch.get_num_threads()),
            ctypes.c_void_p(out.ctypes.data),
        )
    return out
