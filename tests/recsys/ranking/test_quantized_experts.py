# SPDX-License-Identifier: Apache-2.0
"""Mixtures whose experts have a byte for each weight: beside the same mixture with the widened weights, and what a trained ranker loses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score

from recsys.core.config import validate
from recsys.core.errors import ConfigError
from recsys.ranking.models import TokenMixerLarge
from recsys.ranking.per_token import SwiGLU, quantize_mixtures
from recsys.ranking.per_token.quantized import Mixture
from recsys.ranking.per_token.relu_moe import ReluMoE
from recsys.ranking.per_token.sparse_moe import SparseMoE
from recsys.scaling.data import PlantedData
from recsys.training.optim import DenseOptimizer
from recsys.training.progress import NoProgress
from recsys.training.trainer import Trainer

T, D, FLOAT8 = 3, 16, torch.float8_e4m3fn
KINDS: dict[str, Callable[..., Mixture]] = {
    "sparse_moe": lambda **more: SparseMoE(validate(SparseMoE.Config, {"experts": 4, "active": 3, "down_init": 1.0} | more), T, D),
    "relu_moe": lambda **more: ReluMoE(validate(ReluMoE.Config, {"experts": 4, "expansion": 2.0} | more), T, D),
}
EACH = pytest.mark.parametrize("kind", list(KINDS))
BYTES = pytest.mark.parametrize("dtype", [torch.int8, FLOAT8], ids=["int8", "float8"])


def built(kind: str, **more: Any) -> Mixture:
    torch.manual_seed(0)
    return KINDS[kind](**more).eval()


def rows(count: int = 9) -> torch.Tensor:
    return torch.randn(count, T, D, generator=torch.Generator().manual_seed(1))


def widened(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return q.float() * scale.unsqueeze(-2)


@BYTES
@EACH
def test_a_quantized_mixture_is_the_mixture_of_the_widened_weights(kind: str, dtype: torch.dtype) -> None:
    small, wide = built(kind), built(kind)
    assert quantize_mixtures(small, dtype) == 1
    assert small.quantized is not None
    w_in = widened(small.quantized.q_in, small.quantized.scale_in)
    w_out = widened(small.quantized.q_out, small.quantized.scale_out)
    with torch.no_grad():
        if isinstance(wide, SparseMoE):
            wide.gate_up.copy_(w_in)
            wide.down.copy_(w_out)
        else:
            assert isinstance(wide, ReluMoE)
            wide.up.copy_(w_in.transpose(1, 2).flatten(2))
            wide.down.copy_(w_out.flatten(1, 2))
        torch.testing.assert_close(small(rows()), wide(rows()), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(small(rows()), built(kind)(rows()), rtol=1e-4, atol=1e-5)


@EACH
def test_flops_and_idle_weights_are_what_they_were(kind: str) -> None:
    small, wide = built(kind), built(kind)
    quantize_mixtures(small)
    assert (small.flops, small.idle) == (wide.flops, wide.idle)


@BYTES
@EACH
def test_its_state_goes_through_safetensors_and_a_cast_leaves_it_alone(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small, other = built(kind), built(kind, down_init=0.5)
    quantize_mixtures(small, dtype)
    quantize_mixtures(other, dtype)
    safetensors.torch.save_file(small.state_dict(), tmp_path / "state.safetensors")
    state = safetensors.torch.load_file(tmp_path / "state.safetensors")
    assert state["quantized.q_in"].dtype == dtype and not state.keys() & {"gate_up", "up", "down"}
    assert not torch.equal(other(rows()), small(rows()))
    other.load_state_dict(state)
    assert torch.equal(other(rows()), small(rows()))
    cast = small.to(torch.bfloat16)
    assert cast.quantized is not None
    assert {name: buffer.dtype for name, buffer in cast.quantized.named_buffers()} == {
        **dict.fromkeys(("q_in", "q_out"), dtype),
        **dict.fromkeys(("scale_in", "scale_out"), torch.float32),
    }
    assert all(torch.equal(buffer.float(), state[f"quantized.{name}"].float()) for name, buffer in cast.quantized.named_buffers())


@EACH
def test_what_cannot_be_quantized_or_trained_is_an_error(kind: str) -> None:
    mixture = built(kind)
    with pytest.raises(ConfigError, match="expected it in evaluation mode"):
        quantize_mixtures(mixture.train())
    quantize_mixtures(mixture.eval())
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_mixtures(mixture)
    with pytest.raises(ConfigError, match=f"{type(mixture).__name__}: expected evaluation mode"):
        mixture.train()
    with pytest.raises(ConfigError, match="expected per_token: sparse_moe or relu_moe"):
        quantize_mixtures(SwiGLU(SwiGLU.Config(), T, D).eval())


@BYTES
def test_a_trained_ranker_keeps_its_quality_in_half_of_the_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    planted = {"fields": 8, "groups": 4, "cardinality": (8, 20), "dense": 2, "test": 4000}
    data = PlantedData(validate(PlantedData.Config, {"name": "planted", **planted}))
    torch.manual_seed(0)
    experts = {"name": "sparse_moe", "expansion": 4.0, "experts": 4, "active": 3}
    settings = {"blocks": 2, "dim": 60, "tokenizer": {"name": "groups"}, "per_token": experts, "embedding": {"dim": 8}}
    ranker = TokenMixerLarge(validate(TokenMixerLarge.Config, {"name": "tokenmixer_large", **settings}), data.spec)
    how = Trainer.Config(epochs=1, optimizer=DenseOptimizer(name="adam", learning_rate=0.003), clip_norm=1.0)
    Trainer(how, tmp_path, progress=NoProgress()).fit(ranker, data.train(10_000, 0, 256))
    before, bytes_before = probabilities(ranker.eval(), data), stored(ranker)
    assert quantize_mixtures(ranker, dtype) == 4  # two blocks, each with one before and one behind the revert
    after, labels = probabilities(ranker, data), torch.cat([batch.labels[:, 0] for batch in data.test(4000) if batch.labels is not None])
    assert roc_auc_score(labels, before) > 0.6
    assert abs(roc_auc_score(labels, after) - roc_auc_score(labels, before)) < 1e-3
    assert 0 < float((after - before).abs().max()) < 0.02
    assert stored(ranker) < 0.5 * bytes_before


@torch.no_grad()
def probabilities(ranker: TokenMixerLarge, data: PlantedData) -> torch.Tensor:
    return torch.cat([ranker.predict(batch)[:, 0] for batch in data.test(4000)])


def stored(ranker: TokenMixerLarge) -> int:
    """Bytes of the network's state, tables apart."""
    return sum(tensor.nbytes for name, tensor in ranker.state_dict().items() if not name.startswith("tables."))
