# SPDX-License-Identifier: Apache-2.0
"""The sizes and rates that contestants share, so that a ratio compares implementations and not models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DCNv2Sizes:
    """DCNv2: cross layers beside an MLP."""

    embedding: int = 16
    cross_layers: int = 3
    hidden: tuple[int, ...] = (400, 400, 400)
    dense_rate: float = 1e-3


@dataclass(frozen=True)
class DLRMSizes:
    """DLRM_DCN: a bottom MLP, low-rank cross layers, a top MLP."""

    embedding: int = 16
    bottom: tuple[int, ...] = (400, 16)
    cross_layers: int = 3
    rank: int = 64
    top: tuple[int, ...] = (400, 400)
    dense_rate: float = 1e-3
    table_rate: float = 0.05
    init_std: float = 0.01


DCNV2, DLRM = DCNv2Sizes(), DLRMSizes()
