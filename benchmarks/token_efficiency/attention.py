# SPDX-License-Identifier: Apache-2.0
"""Attention over long histories beside fused dense attention: what FASA, TokenSelect, Token Sparse Attention, DHSA and BiFormer save.

What a choice loses is measured on planted skewed attention (`attention_planted`): the share of the dense attention that is not read, and
how far the results are off.
"""

import torch

from benchmarks.frame import Check
from benchmarks.token_efficiency.attention_decoding import fasa_rows, select_rows
from benchmarks.token_efficiency.attention_prefill import biformer_rows, dhsa_rows, sparse_rows
from benchmarks.token_efficiency.rows import Row


@torch.inference_mode()
def measure(quick: bool) -> tuple[list[Row], list[Check]]:
    """The rows and the checks of this part."""
    rows: list[Row] = []
    checks: list[Check] = []
    for part in (fasa_rows, select_rows, sparse_rows, dhsa_rows, biformer_rows):
        own, found = part(quick)
        rows += own
        checks += found
    return rows, checks
