# SPDX-License-Identifier: Apache-2.0
"""RPG's item tokenizer (KDD 2025, arXiv 2506.05781): principal components, whitened, in many short parts (product quantisation)."""

from typing import Literal

# torch before FAISS, as everywhere in this project: whichever comes first owns the OpenMP settings.
import torch  # isort: skip
import faiss
from pydantic import Field
from torch import Tensor

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import ConfigError
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress
from recsys.retrieval.tokenizers.codewords import faiss_seed, nearest

_BITS = 8
_CODES = 1 << _BITS
_PAPER_DIM = 512
_SMALLEST_VARIANCE = 1e-10  # of a principal component, relative to the first one's


@register("item_tokenizer", "opq")
class OPQ(CodeTokenizer):
    """``x → PCA, whitened → rotation → K slots, each with its nearest of 256 codewords``: optimised product quantisation (OPQ) by FAISS.

    Follows the authors' code, which trains the FAISS index ``OPQ{K},IVF1,PQ{K}x8`` on the items of the training period and reads the codes
    out of its one list. Left out is what changes no code but its number: IVF1, which moves all vectors alike; the metric, inner product,
    since codewords are learnt and looked up by Euclidean distance whatever it is; and FAISS's renumbering of each slot's codes.

    Differs from it: the principal components too are those of the warm items; the authors' are those of all items, test period included.
    A component in which they do not vary is zero: whitening would blow up what rounding left of it.

    The same seed gives the same codes on one machine with one number of threads, on which FAISS's sums depend.

    Raises:
        ConfigError: ``dim`` is not a multiple of ``slots``, or more than the features have; fewer warm items than 256 or ``dim``.
    """

    class Config(BaseConfig):
        """Sizes and training.

        Attributes:
            slots: K, the number of codes of an item.
            dim: principal components kept, a multiple of ``slots``; None for the paper's 512 or, where the features have fewer dimensions,
                for as many as they allow.
            iterations: of the alternation between rotation and codewords.
        """

        name: Literal["opq"] = "opq"
        slots: int = Field(32, ge=1)
        dim: int | None = Field(None, ge=1)
        iterations: int = Field(50, ge=1)

    config: Config
    mean: Tensor
    components: Tensor
    scale: Tensor
    rotation: Tensor
    centroids: Tensor

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """256 for each slot."""
        return (_CODES,) * self.config.slots

    def _build(self, width: int) -> None:
        slots = self.config.slots
        dim = self.config.dim or min(_PAPER_DIM, width) // slots * slots
        if dim % slots or not slots <= dim <= width:
            raise ConfigError(
                f"item tokenizer 'opq': dim: expected a multiple of {slots} slots within the features' width {width}, got {dim}"
            )
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.zeros(dim, width))
        self.register_buffer("scale", torch.ones(dim))  # the deviation along each component
        self.register_buffer("rotation", torch.eye(dim))
        self.register_buffer("centroids", torch.zeros(slots, _CODES, dim // slots))

    def whiten(self, features_nd: Tensor) -> Tensor:
        """float64 ``[N, dim]``: the principal components, each of variance 1 on the items of training."""
        return (features_nd.double() - self.mean) @ self.components.double().T / self.scale

    def _fit(self, features_nd: Tensor, generator: torch.Generator, progress: Progress | None) -> None:
        least = max(_CODES, len(self.scale))  # with fewer than ``dim``, FAISS writes beyond its memory
        if len(features_nd) < least:
            raise ConfigError(f"item tokenizer 'opq': needs at least {least} warm items, got {len(features_nd)}")
        self._fit_components(features_nd.double())
        white = self.whiten(features_nd).float().numpy()
        seed = faiss_seed(generator)
        transform = faiss.OPQMatrix(white.shape[1], self.config.slots)
        transform.niter = self.config.iterations
        quantiser = _quantiser(white.shape[1], self.config.slots, seed)
        transform.pq = quantiser
        transform.train(white)
        self.rotation.copy_(torch.from_numpy(faiss.vector_to_array(transform.A)).view_as(self.rotation))
        quantiser = _quantiser(white.shape[1], self.config.slots, seed)
        quantiser.train(transform.apply(white))
        self.centroids.copy_(torch.from_numpy(faiss.vector_to_array(quantiser.centroids)).view_as(self.centroids))
        if progress is not None:
            left = features_nd - self._decode(self._encode(features_nd))
            progress(1, 1, {"error": float(left.square().sum() / (features_nd - self.mean).square().sum())})

    def _fit_components(self, features_nd: Tensor) -> None:
        from sklearn.decomposition import PCA  # fitting alone needs it, and a server never fits

        pca = PCA(len(self.scale), svd_solver="covariance_eigh").fit(features_nd.numpy())
        variance = torch.from_numpy(pca.explained_variance_)
        varies = variance > _SMALLEST_VARIANCE * variance[0]
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.components.copy_(torch.from_numpy(pca.components_) * varies[:, None])
        self.scale.copy_(torch.where(varies, variance.sqrt(), 1.0))

    def _encode(self, features_nd: Tensor) -> Tensor:
        rotated = self.whiten(features_nd) @ self.rotation.double().T
        return nearest(rotated.unflatten(1, (self.config.slots, -1)).transpose(0, 1), self.centroids).T

    def _decode(self, codes_nl: Tensor) -> Tensor:
        rotated = self.centroids[torch.arange(self.config.slots), codes_nl].flatten(1)
        return rotated @ self.rotation * self.scale @ self.components + self.mean


def _quantiser(dim: int, slots: int, seed: int) -> faiss.ProductQuantizer:
    quantiser = faiss.ProductQuantizer(dim, slots, _BITS)
    quantiser.cp.seed = seed
    quantiser.cp.min_points_per_centroid = 1  # fewer than FAISS's 39 are worth no warning for every slot and iteration
    return quantiser
