# SPDX-License-Identifier: Apache-2.0
"""Full cross-entropy over a catalogue, slot by slot."""

import torch
from torch import Tensor


def catalogue_cross_entropy(states_snd: Tensor, items_cnd: Tensor, targets: Tensor, of_target: Tensor) -> Tensor:
    """Mean cross-entropy of the targets in each slot, from raw inner products.

    The log-sum-exp is taken once for each state, however many targets share it.

    Args:
        states_snd: ``[S, n, d]`` slot vectors of the states.
        items_cnd: ``[C, n, d]`` slot vectors of the candidates.
        targets: int64 ``[M]`` rows of ``items_cnd``.
        of_target: int64 ``[M]`` the state of each target.

    Returns:
        ``[n]``: the mean over targets for each slot; zero where M = 0.
    """
    log_z = torch.stack([(s @ e.T).logsumexp(-1) for s, e in zip(states_snd.unbind(1), items_cnd.unbind(1), strict=True)], 1)
    target_logit = (states_snd[of_target] * items_cnd[targets]).sum(-1)
    return (log_z[of_target] - target_logit).sum(0) / max(len(targets), 1)
