# SPDX-License-Identifier: Apache-2.0
"""FBGEMM: table-batched embeddings (TBE) and jagged ops, forward and backward."""

import fbgemm_gpu
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from pipelines.doctor.probes import Trial, expect


def probe() -> Trial:
    """Try what embedding tables and sequences need."""
    trial = Trial(fbgemm_gpu.__version__)
    trial.attempt("build", lambda: str(getattr(fbgemm_gpu, "__variant__", "unknown")))
    trial.attempt("TBE forward and backward", lambda: _embedding_bags("cpu", EmbeddingLocation.HOST, ComputeDevice.CPU))
    if torch.cuda.is_available():
        trial.attempt("TBE on the GPU", lambda: _embedding_bags("cuda", EmbeddingLocation.DEVICE, ComputeDevice.CUDA))
    trial.attempt("jagged ops forward and backward", _jagged)
    return trial


def _embedding_bags(device: str, location: EmbeddingLocation, compute: ComputeDevice) -> None:
    """One step of SGD at rate 1 on a sum subtracts, from each row, how often it was read."""
    bags = SplitTableBatchedEmbeddingBagsCodegen([(10, 4, location, compute)], optimizer=EmbOptimType.EXACT_SGD, learning_rate=1.0)
    (weight,) = bags.split_embedding_weights()
    weight.copy_(torch.arange(40.0).view(10, 4))
    before = weight.clone()
    rows = torch.tensor([1, 1, 3], device=device)
    pooled = bags(rows, torch.tensor([0, 2, 3], device=device))
    expect(torch.equal(pooled, torch.stack([2 * before[1], before[3]])), "a pooled embedding")
    pooled.sum().backward()
    expect(torch.allclose(weight, before - torch.bincount(rows, minlength=10)[:, None]), "an update of an embedding table")


def _jagged() -> None:
    values = torch.arange(6.0).view(3, 2).requires_grad_()
    dense = torch.ops.fbgemm.jagged_to_padded_dense(values, [torch.tensor([0, 1, 3])], [2], -1.0)
    expect(torch.equal(dense.detach(), torch.tensor([[[0.0, 1], [-1, -1]], [[2, 3], [4, 5]]])), "jagged_to_padded_dense")
    dense.sum().backward()
    expect(values.grad is not None and torch.equal(values.grad, torch.ones(3, 2)), "the gradient of jagged_to_padded_dense")
