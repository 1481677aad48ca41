# SPDX-License-Identifier: Apache-2.0
"""Full cross-entropy over a catalogue, slot by slot, without ever holding the logits of all states."""

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
