# SPDX-License-Identifier: Apache-2.0
"""The products of a computation, against PyTorch's own count of its FLOPs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gemms import Operand, Products
from kernels.token_swiglu import token_swiglu

T, B, D, H = 3, 10, 8, 12


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return token_swiglu(x, gate_up, down, None, None)


def layers(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.bmm(x.transpose(0, 1).flatten(2), gate_up).chunk(2, 2)
    return torch.bmm(functional.silu(gate) * up, down)


@pytest.mark.parametrize("work", [swiglu, layers])
@pytest.mark.parametrize("parts", [(), (2, 4)])
def test_all_flops_are_in_the_products(work: Callable[..., Tensor], parts: tuple[int, ...]) -> None:
    inputs = [torch.randn(size).requires_grad_() for size in ((B, T, *(parts or (D,))), (T, D, 2 * H), (T, H, D))]
    products = Products(lambda: work(*inputs).sum().backward())
    assert len(products) == 6
    assert products.flops == 3 * 2 * T * B * (D * 2 * H + H * D) and products.covered == 1.0
    products.run()


def test_what_is_no_product_is_not_covered() -> None:
    q = torch.randn(1, 1, 6, 4)
    products = Products(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert products.covered < 1


def test_an_operand_lies_in_memory_as_its_tensor_did() -> None:
    tensor = torch.randn(4, 6).t()[:, ::2]
    made = Operand.of(tensor).make()
    assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
