# SPDX-License-Identifier: Apache-2.0
"""What a retriever says about a user. An index declares which of these it accepts; a recipe that pairs the wrong two is an error."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class SlotVectors:
    """One query vector for each token slot: the score of an item is the sum over slots of an inner product (SETRec, SASRec).

    Attributes:
        values: float ``[B, K, d]``; slot weights are already multiplied in.
    """

    values: Tensor

    def flat(self) -> Tensor:
        """float ``[B, K * d]``: one query for an inner-product index over concatenated item slot vectors."""
        return self.values.flatten(1)


class PrefixScorer(Protocol):
    """Scores the next code of each beam of each user, one level after another, from what it keeps of the levels before."""

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        """Take one more code into each beam, and score what may follow.

        Args:
            parents_bw: int64 ``[B, W]``, on the CPU like the codes: which beam of the step before each beam goes on from.
            codes_bw: int64 ``[B, W]``: the code that each took. The first step has W = 1 and empty prefixes: both are -1.

        Returns:
            float ``[B, W, V]``: log-probabilities of the next level's codes; V is at least as many as the level has.
        """
        ...


@dataclass(frozen=True)
class SlotLogProbs:
    """One distribution over codes for each slot, none conditioned on another: an item's score is the sum of its codes' (RPG, RecGPT).

    Attributes:
        values: float ``[B, K, V]`` log-probabilities, with any weights of slots multiplied in; V is the largest level's size, and what
            stands beyond a smaller level's is never read.
        tokenizer: the fingerprint of the tokenizer whose codes they are.
    """

    values: Tensor
    tokenizer: str

    def begin(self) -> PrefixScorer:
        """A scorer that looks at no prefix: slot after slot, the same for all beams of a user."""
        return _Slots(self.values)


class _Slots:
    def __init__(self, values_bkv: Tensor) -> None:
        self._slots = iter(values_bkv.unbind(1))

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        """See `PrefixScorer.step`."""
        return next(self._slots)[:, None].expand(-1, parents_bw.shape[1], -1)


@dataclass(frozen=True)
class EncoderMemory:
    """An encoded history whose next codes are generated one after another (TIGER).

    Attributes:
        values: float ``[B, S, d]``.
        valid: bool ``[B, S]``: the positions that are there.
        tokenizer: the fingerprint of the tokenizer whose codes are generated.
        decoder: makes a scorer of values and valid.
    """

    values: Tensor
    valid: Tensor
    tokenizer: str
    decoder: Callable[[Tensor, Tensor], PrefixScorer]

    def begin(self) -> PrefixScorer:
        """A scorer with nothing generated yet."""
        return self.decoder(self.values, self.valid)
