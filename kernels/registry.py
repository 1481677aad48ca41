# SPDX-License-Identifier: Apache-2.0
"""All ops of this package."""

from kernels.catalogue_loss import OP as CATALOGUE_LOSS
from kernels.constrained_step import OP as CONSTRAINED_STEP
from kernels.fsq import OP as FSQ
from kernels.gather_topk import OP as GATHER_TOPK
from kernels.int8_pooling import OP as INT8_POOLING
from kernels.jagged_attention import OP as JAGGED_ATTENTION
from kernels.op import Op
from kernels.paged_scores import OP as PAGED_SCORES
from kernels.rms_norm import OP as RMS_NORM
from kernels.routed_experts import OP as ROUTED_EXPERTS
from kernels.routed_experts.quantized import OP as ROUTED_EXPERTS_QUANTIZED
from kernels.selected_attention import OP as SELECTED_ATTENTION
from kernels.sinkhorn import OP as SINKHORN
from kernels.square_sums import OP as SQUARE_SUMS
from kernels.token_swiglu import OP as TOKEN_SWIGLU

OPS: tuple[Op, ...] = (
    RMS_NORM,
    SQUARE_SUMS,
    TOKEN_SWIGLU,
    ROUTED_EXPERTS,
    ROUTED_EXPERTS_QUANTIZED,
    SINKHORN,
    JAGGED_ATTENTION,
    SELECTED_ATTENTION,
    PAGED_SCORES,
    CATALOGUE_LOSS,
    CONSTRAINED_STEP,
    GATHER_TOPK,
    FSQ,
    INT8_POOLING,
)
