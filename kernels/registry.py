# SPDX-License-Identifier: Apache-2.0
"""All ops of this package."""

from kernels.op import Op
from kernels.rms_norm import OP as RMS_NORM

OPS: tuple[Op, ...] = (RMS_NORM,)
