# SPDX-License-Identifier: Apache-2.0
"""Nested state as JSON beside safetensors: what a checkpoint writes instead of a pickle."""

import math
from typing import Any

from torch import Tensor

from recsys.core.errors import CheckpointError

# A value that JSON has no word for stands as an object with one of these keys.
_TENSOR, _DICT, _LIST, _TUPLE, _FLOAT = "tensor", "dict", "list", "tuple", "float"


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take nested dicts, lists and tuples of tensors and plain values apart.

    Returns:
        A value fit for strict JSON, in which each tensor is a reference; and the tensors, by their dotted path in ``value``, on the CPU,
        contiguous and without shared memory, as safetensors wants them.

    Raises:
        CheckpointError: a value of another type, which only a pickle could hold.
    """
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()

    def store(path: str, tensor: Tensor) -> str:
        name = path
        while name in tensors:
            name += "'"
        copy = tensor.detach().cpu().contiguous()
        address = copy.untyped_storage().data_ptr()
        tensors[name] = copy.clone() if address in memory else copy
        memory.add(address)
        return name

    def visit(path: str, node: Any) -> Any:
        below = f"{path}." if path else ""
        if isinstance(node, Tensor):
            return {_TENSOR: store(path, node)}
        if isinstance(node, dict):
            # Pairs, and not an object: keys may be numbers.
            return {_DICT: [[_key(path, k), visit(f"{below}{k}", v)] for k, v in node.items()]}
        if isinstance(node, list | tuple):
            return {_TUPLE if isinstance(node, tuple) else _LIST: [visit(f"{below}{i}", v) for i, v in enumerate(node)]}
        if isinstance(node, float) and not math.isfinite(node):
            return {_FLOAT: str(node)}
        if node is None or type(node) in (bool, int, float, str):
            return node
        raise CheckpointError(f"{path or 'state'}: a {type(node).__name__} cannot be saved without a pickle")

    return visit("", value), tensors


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """Put together what `pack` took apart.

    Raises:
        CheckpointError: ``packed`` is not of that form, or a tensor is absent.
    """
    if not isinstance(packed, dict):
        return packed
    match list(packed.items()):
        case [(key, name)] if key == _TENSOR and name in tensors:
            return tensors[name]
        case [(key, pairs)] if key == _DICT:
            return {k: unpack(v, tensors) for k, v in pairs}
        case [(key, values)] if key == _LIST:
            return [unpack(v, tensors) for v in values]
        case [(key, values)] if key == _TUPLE:
            return tuple(unpack(v, tensors) for v in values)
        case [(key, text)] if key == _FLOAT:
            return float(text)
    raise CheckpointError(f"state: cannot read {packed!r}")


def _key(path: str, key: Any) -> str | int:
    if type(key) not in (str, int):
        raise CheckpointError(f"{path or 'state'}: expected keys that are text or whole numbers, got {key!r}")
    return key  # type: ignore[no-any-return]
