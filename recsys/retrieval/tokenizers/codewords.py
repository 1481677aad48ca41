# SPDX-License-Identifier: Apache-2.0
"""What the tokenizers with learnt codewords share: k-means, and the nearest codeword."""

# torch before FAISS, as everywhere in this project: whichever comes first owns the OpenMP settings.
import torch  # isort: skip
import faiss
from torch import Tensor

from recsys.core.errors import ConfigError

_TIE = 1e-12  # relative to the squared lengths: distances that differ by less are equal


def k_means(rows_nd: Tensor, codes: int, iterations: int, generator: torch.Generator) -> Tensor:
    """float32 ``[K, D]``: centroids by FAISS: k-means++, then Lloyd over all rows; a cluster that runs empty splits a large one.

    Args:
        rows_nd: ``[N, D]``.
        codes: K.
        iterations: of Lloyd.
        generator: of FAISS's seed.

    Raises:
        ConfigError: there are fewer rows than codes.
    """
    if len(rows_nd) < codes:
        raise ConfigError(f"codes: {codes} need at least as many warm items, got {len(rows_nd)}")
    clustering = faiss.Kmeans(
        rows_nd.shape[1],
        codes,
        niter=iterations,
        seed=faiss_seed(generator),
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows_nd),
    )
    clustering.train(rows_nd.detach().float().numpy())
    return torch.from_numpy(clustering.centroids)


def faiss_seed(generator: torch.Generator) -> int:
    """A seed for FAISS, drawn from a generator."""
    return int(torch.randint(1 << 31, (), generator=generator))


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """int64 ``[..., N]``: the codeword of ``[..., K, D]`` nearest to each row of ``[..., N, D]``; of equally near ones the first.

    In float64, so that how many rows are looked up together changes no code: where a float32 product rounds depends on that.
    """
    wide, words = rows.double(), codebook.double()
    lengths = words.square().sum(-1)[..., None, :]
    distance = lengths - 2 * wide @ words.transpose(-1, -2)  # less the row's own square
    slack = _TIE * (wide.square().sum(-1, keepdim=True) + lengths.amax(-1, keepdim=True))
    return (distance <= distance.amin(-1, keepdim=True) + slack).long().argmax(-1)
