# SPDX-License-Identifier: Apache-2.0
"""The log-partition of a softmax over a catalogue, slot by slot: ``out[k] = Σ_s w_s · log Σ_c exp⟨states[s, k], items[c, k]⟩``."""

import torch
from torch import Tensor


def weighted_log_partition(states_snd: Tensor, items_cnd: Tensor, weights_s: Tensor) -> Tensor:
    """The definition.

    Args:
        states_snd: ``[S, n, d]``, float32, bfloat16, float16 or float64.
        items_cnd: ``[C, n, d]``, C at least 1.
        weights_s: ``[S]``: how much each state counts. Constants.

    Returns:
        ``[n]`` in the dtype of the weights. Everything is computed in float32 (float64 for float64).
    """
    wide = torch.promote_types(states_snd.dtype, torch.float32)
    logits_nsc = torch.einsum("snd,cnd->nsc", states_snd.to(wide), items_cnd.to(wide))
    return (logits_nsc.logsumexp(2) * weights_s.to(wide)).sum(1).to(weights_s.dtype)
