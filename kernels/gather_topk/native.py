# SPDX-License-Identifier: Apache-2.0
"""The search on the CPU by a loop in C++, from numpy to numpy; and the op's lists by it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kernels import native
from kernels.gather_topk.cpu import SIGN, lists_of, prepared

LANES = 16  # users whose numbers lie in one register
_SOURCE = Path(__file__).with_name("cpu.cpp")


def available() -> bool:
    """Whether there is a search on this machine; compiles it where it has not been."""
    return native.load(_SOURCE) is not None


def supports(values_bkv: Tensor, _: int) -> bool:
    """Whether numbers are of at most 32 bits, items have codes, and there is a compiler."""
    return values_bkv.dtype != torch.float64 and values_bkv.shape[1] > 0 and available()


def forward(
    values_bkv: Tensor, codes_nk: Tensor, rows: Tensor | None, excluded_offsets: Tensor | None, excluded: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """See `kernels.gather_topk.best_items`.

    Raises:
        RuntimeError: a code is beyond the slots' numbers, or a row beyond the items.
    """
    given = prepared(values_bkv, codes_nk, rows, excluded_offsets, excluded)
    chosen = None if rows is None else rows.contiguous().numpy()
    keys = search(given.weights, given.bags, k, chosen, given.offsets.numpy(), given.excluded.numpy())
    return lists_of(torch.from_numpy(keys.view(np.int64)) ^ SIGN, values_bkv.dtype)


def search(
    weights_vb: Tensor, bags_nk: Tensor, k: int, rows: np.ndarray | None, excluded_offsets: np.ndarray, excluded_rows: np.ndarray
) -> np.ndarray:
    """See `kernels.gather_topk.gather_topk`; only where `available`."""
    users = weights_vb.shape[1]
    weights = functional.pad(weights_vb, (0, -users % LANES)).unflatten(1, (-1, LANES)).transpose(0, 1).contiguous()  # [groups, V, LANES]
    out = np.zeros((users, k), np.uint64)
    if users and k:
        chosen = None if rows is None else torch.from_numpy(rows)
        excluded = (torch.from_numpy(excluded_offsets), torch.from_numpy(excluded_rows)) if len(excluded_rows) else (None, None)
        native.call(
            _SOURCE, "gather_topk", weights, weights.shape[1], weights.shape[0], users, bags_nk, bags_nk.shape[1], chosen,
            len(bags_nk) if rows is None else len(rows), *excluded, k, torch.get_num_threads(), torch.from_numpy(out.view(np.int64)),
        )  # fmt: skip
    return out
