# SPDX-License-Identifier: Apache-2.0
"""Block styles, each a stack of blocks in one file under its name."""

from recsys.ranking.stacks.base import Block, Parts, Sequence, Stack
from recsys.ranking.stacks.mix_revert import MixRevert, MixRevertBlock, Residual
from recsys.ranking.stacks.residual import PostNorm, PreNorm
from recsys.ranking.stacks.siamese import Siamese

__all__ = ["Block", "MixRevert", "MixRevertBlock", "Parts", "PostNorm", "PreNorm", "Residual", "Sequence", "Siamese", "Stack"]
