# SPDX-License-Identifier: Apache-2.0
"""Int8 pooling on the CPU by FBGEMM's inference look-up, straight from the stored rows."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.int8_pooling.reference import HEADER


def forward(rows: Tensor, values: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, D]`` of ``rows [R, 4 + D]``, contiguous; sums are taken in float32.

    Raises:
        RuntimeError: a value is beyond the table, or the offsets do not divide the values into bags.
    """
    check(rows, values, offsets)
    settings = _settings(rows.shape[1] - HEADER, dtype)  # which registers the look-up
    pooled: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
        dev_weights=rows.view(-1), indices=values, offsets=offsets, indice_weights=None, **settings
    )
    return pooled


@cache
def _settings(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """What FBGEMM wants to know of one table of int8 on the host."""
    import fbgemm_gpu  # noqa: F401
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode

    return {
        "uvm_weights": torch.empty(0, dtype=torch.uint8),
        "weights_placements": torch.tensor([EmbeddingLocation.HOST], dtype=torch.int32),
        "weights_offsets": torch.zeros(1, dtype=torch.int64),
        "weights_tys": torch.tensor([SparseType.INT8.as_int()], dtype=torch.uint8),
        "D_offsets": torch.tensor([0, width], dtype=torch.int32),
        "total_D": width,
        **{f"max_{kind}_D": 0 for kind in ("int2", "int4", "float16", "float32")},
        "max_int8_D": width,
        "pooling_mode": int(PoolingMode.SUM),
        "output_dtype": SparseType.from_dtype(dtype).as_int(),
        "row_alignment": 1,
    }


def check(rows: Tensor, values: Tensor, offsets: Tensor) -> None:
    """Look through values and offsets: FBGEMM takes a row of -1 for a pruned one.

    Raises:
        RuntimeError: a value is beyond the table, or the offsets do not divide the values into bags.
    """
    if len(values):
        least, most = (int(end) for end in torch.aminmax(values))
        if not 0 <= least <= most < len(rows):
            raise RuntimeError(f"values: expected rows from 0 to {len(rows) - 1}, got {least} to {most}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(values) or bool((offsets.diff() < 0).any()):
        raise RuntimeError(f"offsets: expected not descending ones from 0 to {len(values)}, got {int(offsets[0])} to {int(offsets[-1])}")
