# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a catalogue: in full, slot by slot, without ever holding the logits of all states; or by a sample of it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at a time. On a CPU they should stay in the cache; on a GPU fewer, larger products are faster.
_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 26}


def catalogue_cross_entropy(states_snd: Tensor, items_cnd: Tensor, targets: Tensor, of_target: Tensor) -> Tensor:
    """Mean cross-entropy of the targets in each slot, from raw inner products.

    The log-sum-exp is taken once for each state, however many targets share it. Its gradient is computed along with it, chunk by
    chunk, so that memory is S·n·d + C·n·d instead of S·n·C; hence it can be differentiated only once. Computed in float32 at least,
    also under autocast.

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
        share = 1.0 / max(len(targets), 1)
        weights = torch.bincount(of_target, minlength=len(states_snd)).to(states_snd.dtype) * share
        differentiate = torch.is_grad_enabled() and (states_snd.requires_grad or items_cnd.requires_grad)
        log_partition: Tensor = _WeightedLogPartition.apply(states_snd, items_cnd, weights, differentiate)
        target_logit = (states_snd[of_target] * items_cnd[targets]).sum(-1)
        return log_partition - target_logit.sum(0) * share


def sampled_cross_entropy(
    states_sd: Tensor, items_cd: Tensor, targets: Tensor, of_target: Tensor, drawn: Tensor, probability_c: Tensor
) -> Tensor:
    """Mean cross-entropy of the targets against a sample of the candidates, for catalogues whose logits are too many.

    The other candidates' sum ``Σ_{c ≠ t} exp⟨s, c⟩`` is estimated without bias by ``(1 / n) Σ_j exp⟨s, c_j⟩ / q(c_j)`` over the drawn ones
    that are not the target: the logQ correction (Bengio & Senécal 2008; Yi et al., RecSys 2019). The logarithm of an estimate is below
    that of the sum on average, the less so the more are drawn. Computed in float32 at least, also under autocast.

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
        return (partition_m - target_m).sum() / max(len(targets), 1)


class _WeightedLogPartition(torch.autograd.Function):
    """``out[k] = Σ_s weights[s] · log Σ_c exp⟨states[s, k], items[c, k]⟩``. The weights are constants."""

    @staticmethod
    def forward(ctx: Any, states_snd: Tensor, items_cnd: Tensor, weights: Tensor, differentiate: bool) -> Tensor:
        states_nsd, items_ncd = states_snd.transpose(0, 1).contiguous(), items_cnd.transpose(0, 1).contiguous()
        rows = max(16, _CHUNK.get(states_snd.device.type, 1 << 26) // max(len(items_cnd), 1))
        states_grad, items_grad = torch.empty_like(states_nsd), torch.zeros_like(items_ncd)
        out = states_snd.new_zeros(states_snd.shape[1])
        for k, items in enumerate(items_ncd):
            for begin in range(0, len(states_snd), rows):
                chunk = slice(begin, begin + rows)
                weight = weights[chunk, None]
                exps = states_nsd[k, chunk] @ items.T
                largest = exps.amax(1, keepdim=True)
                total = exps.sub_(largest).exp_().sum(1, keepdim=True)
                out[k] += ((largest + total.log()) * weight).sum()
                if differentiate:
                    exps.mul_(weight / total)
                    torch.mm(exps, items, out=states_grad[k, chunk])
                    items_grad[k].addmm_(exps.T, states_nsd[k, chunk])
        if differentiate:
            ctx.save_for_backward(states_grad, items_grad)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states_grad, items_grad = ctx.saved_tensors
        scale = grad[:, None, None]
        return (states_grad * scale).transpose(0, 1), (items_grad * scale).transpose(0, 1), None, None
