# SPDX-License-Identifier: Apache-2.0
"""First enlarge, then sparse (TokenMixer-Large, arXiv 2602.06563): from dense per-token SwiGLUs to sparse mixtures of their slices.

The hidden axis of a `SwiGLU` is cut into E slices, which become the experts of a `SparseMoE`; the first one is shared. With all experts
active, routers of zeros and α = E - 1 the function is the same: gates are 1 / (E - 1), and the slices' outputs add up to the whole.
"""

from typing import TypeVar

from recsys.core.errors import ConfigError
from recsys.embedding.tables import dense_parameters
from recsys.ranking.per_token.sparse_moe import SparseMoE
from recsys.ranking.per_token.swiglu import SwiGLU
from recsys.ranking.token_ranker import TokenRanker

R = TypeVar("R", bound=TokenRanker)


def sparsify(dense: SwiGLU, config: SparseMoE.Config) -> SparseMoE:
    """A mixture whose experts are slices of ``dense``, with new routers; ``dense`` keeps its weights.

    Raises:
        ConfigError: ``dense`` has biases, or another hidden width than ``config``.
    """
    with dense.down.device:
        sparse = SparseMoE(config, dense.tokens, dense.dim).to(dense.down.dtype)
    sparse.load_dense(dense)
    return sparse.train(dense.training)


def sparsify_ranker(ranker: R, config: SparseMoE.Config) -> R:
    """A copy of a trained ranker in which every `SwiGLU` has become a `SparseMoE`; its configuration says so.

    Everything else is copied, the state of the tables' optimizer included. ``ranker`` stays as it is.

    Raises:
        ConfigError: its per-token transformation is not a `SwiGLU`, or ``config`` does not fit it.
    """
    if not isinstance(ranker.config.per_token, SwiGLU.Config):
        raise ConfigError(f"per_token: expected swiglu, which alone can be made sparse, got {ranker.config.per_token!r}")
    with next(dense_parameters(ranker)).device:
        sparse = type(ranker)(ranker.config.model_copy(update={"per_token": config}), ranker.spec)
    swiglus = {name: module for name, module in ranker.named_modules() if isinstance(module, SwiGLU)}
    below = tuple(f"{name}." for name in swiglus)
    kept = {key: value for key, value in ranker.state_dict().items() if not key.startswith(below)}
    missing, unexpected = sparse.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(key.startswith(below) for key in missing)
    for name, module in swiglus.items():
        target = sparse.get_submodule(name)
        assert isinstance(target, SparseMoE)
        target.load_dense(module)
    sparse.tables.load_fused_state(ranker.tables.fused_state())
    return sparse.train(ranker.training)
