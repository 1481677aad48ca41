# SPDX-License-Identifier: Apache-2.0
"""What holds of every registered mixer and per-token transformation, with the default configuration."""

import pytest
import torch

from recsys.core import components
from recsys.ranking.mixers import Mixer, ReversibleMixer
from recsys.ranking.per_token import PerToken

TOKENS, DIM = 4, 8
MIXERS, PER_TOKEN = components.names("mixer"), components.names("per_token")
EVERYTHING = [("mixer", name) for name in MIXERS] + [("per_token", name) for name in PER_TOKEN]


def build(kind: str, name: str) -> torch.nn.Module:
    cls = components.get(kind, name)
    torch.manual_seed(0)
    module: torch.nn.Module = cls(cls.Config(), TOKENS, DIM)
    return module.train(kind != "mixer")  # a mixer that anneals is another function at every pass of training


def test_something_is_registered() -> None:
    assert {"identity", "token_mix"} <= set(MIXERS)
    assert {"ffn", "swiglu"} <= set(PER_TOKEN)


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_shape_and_type(kind: str, name: str) -> None:
    module = build(kind, name)
    assert isinstance(module, {"mixer": Mixer, "per_token": PerToken}[kind])
    assert (module.tokens, module.dim) == (TOKENS, DIM)
    for rows in (1, 3):
        y = module(torch.randn(rows, TOKENS, DIM))
        assert y.shape == (rows, TOKENS, DIM)
        assert y.dtype == torch.float32


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_rows_of_the_batch_do_not_see_each_other(kind: str, name: str) -> None:
    module, x, order = build(kind, name), torch.randn(5, TOKENS, DIM), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(module(x[order]), module(x)[order])
    torch.testing.assert_close(module(x[:2]), module(x)[:2])


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_gradients_agree_with_finite_differences(kind: str, name: str) -> None:
    module = build(kind, name).double()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x, fast_mode=True)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_the_layout_in_memory_does_not_matter(kind: str, name: str) -> None:
    module, x = build(kind, name), torch.randn(3, TOKENS, DIM)
    torch.testing.assert_close(module(x.transpose(0, 1).contiguous().transpose(0, 1)), module(x))


@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_transformations_keep_tokens_apart(name: str) -> None:
    module = build("per_token", name)
    jacobian = torch.autograd.functional.jacobian(module, torch.randn(1, TOKENS, DIM))[0, :, :, 0].abs().amax(dim=(1, 3))
    assert torch.equal(jacobian > 0, torch.eye(TOKENS, dtype=torch.bool))


@pytest.mark.parametrize("name", MIXERS)
def test_revert_undoes_a_reversible_mixer_bitwise(name: str) -> None:
    module, x = build("mixer", name), torch.randn(3, TOKENS, DIM)
    if isinstance(module, ReversibleMixer):
        assert torch.equal(module.revert(module(x)), x)


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_a_state_dict_carries_everything(kind: str, name: str) -> None:
    module, x = build(kind, name), torch.randn(3, TOKENS, DIM)
    torch.manual_seed(1)
    cls = type(module)
    other = cls(cls.Config(), TOKENS, DIM)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(("kind", "name"), EVERYTHING)
def test_compiled_without_graph_breaks_it_equals_eager(kind: str, name: str) -> None:
    module, x = build(kind, name), torch.randn(3, TOKENS, DIM, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    (got,), (expected,) = torch.autograd.grad(compiled(x).square().sum(), x), torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(got, expected)
