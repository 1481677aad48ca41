# SPDX-License-Identifier: Apache-2.0
"""What a retriever says about a user. An index declares which of these it accepts; a recipe that pairs the wrong two is an error."""

from dataclasses import dataclass

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
