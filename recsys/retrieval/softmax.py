# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a catalogue: in full, slot by slot, without ever holding the logits of all states; or by a sample of it."""

import torch
from torch import Tensor

from kernels.catalogue_loss import weighted_log_partition
from recsys.data.world import shared_count


def catalogue_cross_entropy(states_snd: Tensor, items_cnd: Tensor, targets: Tensor, of_target: Tensor) -> Tensor:
    """Mean cross-entropy of the targets in each slot, from raw inner products.

    The log-sum-exp is taken once for each state, however many targets share it, by `kernels.catalogue_loss`: its memory is S·n·d + C·n·d
    instead of S·n·C. It can be differentiated once, with one backward pass or several; a second derivative is an error. Computed in
    float32 at least, also under autocast. Where several processes train, targets are counted over all of them, see `shared_count`.

    Args:
        states_snd: ``[S, n, d]`` slot vectors of the states.
        items_cnd: ``[C, n, d]`` slot vectors of the candidates.
        targets: int64 ``[M]`` rows of ``items_cnd``.
        of_target: int64 ``[M]`` the state of each target.

    Returns:
        ``[n]``: the mean over targets for each slot; zero where M = 0.
    """
    with torch.autocast(states_snd.device.type, enabled=False):
        states_snd, items_cnd = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (states_snd, items_cnd))
        share = 1.0 / shared_count(len(targets), states_snd)
        weights = torch.bincount(of_target, minlength=len(states_snd)).to(states_snd.dtype) * share
        log_partition = weighted_log_partition(states_snd, items_cnd, weights)
        target_logit = (states_snd[of_target] * items_cnd[targets]).sum(-1)
        return log_partition - target_logit.sum(0) * share


def sampled_cross_entropy(
    states_sd: Tensor, items_cd: Tensor, targets: Tensor, of_target: Tensor, drawn: Tensor, probability_c: Tensor
) -> Tensor:
    """Mean cross-entropy of the targets against a sample of the candidates, for catalogues whose logits are too many.

    The other candidates' sum ``Σ_{c ≠ t} exp⟨s, c⟩`` is estimated without bias by ``(1 / n) Σ_j exp⟨s, c_j⟩ / q(c_j)`` over the drawn ones
    that are not the target: the logQ correction (Bengio & Senécal 2008; Yi et al., RecSys 2019). The logarithm of an estimate is below
    that of the sum on average, the less so the more are drawn. Computed in float32 at least, also under autocast. Where several processes
    train, targets are counted over all of them, and each process may compare its own with candidates that it drew itself.

    Args:
        states_sd: ``[S, d]``.
        items_cd: ``[C, d]`` the candidates.
        targets: int64 ``[M]`` rows of ``items_cd``.
        of_target: int64 ``[M]`` the state of each target.
        drawn: int64 ``[n]`` rows of ``items_cd``, drawn with replacement.
        probability_c: ``[C]``: q, the probability of a candidate to be the one drawn.

    Returns:
        A scalar; zero where M = 0.
    """
    with torch.autocast(states_sd.device.type, enabled=False):
        states_sd, items_cd = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (states_sd, items_cd))
        target_m = (states_sd[of_target] * items_cd[targets]).sum(-1)
        logits_sn = states_sd @ items_cd[drawn].T - (probability_c[drawn] * len(drawn)).log()
        others_mn = logits_sn[of_target].masked_fill(drawn == targets[:, None], -torch.inf)
        partition_m = torch.logsumexp(torch.cat((target_m[:, None], others_mn), 1), 1)
        return (partition_m - target_m).sum() / shared_count(len(targets), states_sd)
