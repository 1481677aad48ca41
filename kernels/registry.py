# SPDX-License-Identifier: Apache-2.0
"""All ops of this package."""

from kernels.fsq import OP as FSQ
from kernels.int8_pooling import OP as INT8_POOLING
from kernels.jagged_attention import OP as JAGGED_ATTENTION
from kernels.op import Op
from kernels.paged_scores import OP as PAGED_SCORES
from kernels.rms_norm import OP as RMS_NORM
from kernels.selected_attention import OP as SELECTED_ATTENTION
from kernels.sinkhorn import OP as SINKHORN
from kernels.token_swiglu import OP as TOKEN_SWIGLU

OPS: tuple[Op, ...] = (RMS_NORM, JAGGED_ATTENTION, TOKEN_SWIGLU, SINKHORN, FSQ, INT8_POOLING, SELECTED_ATTENTION, PAGED_SCORES)
