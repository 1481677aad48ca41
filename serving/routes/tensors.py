# SPDX-License-Identifier: Apache-2.0
"""The tensors of the Open Inference Protocol v2: in JSON, and by its extension in binary behind the JSON."""

import struct
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, Field

from serving.routes.several import Malformed, invalid, parsed

HEADER = "inference-header-content-length"
MOST = 1000
"""Rows of a request."""


class Tensor(BaseModel):
    """A tensor of a request."""

    name: str
    shape: list[Annotated[int, Field(ge=0, le=2**31)]]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class Wanted(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class Inference(BaseModel):
    """A request."""

    id: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[Tensor] = Field(max_length=16)
    outputs: list[Wanted] | None = Field(None, max_length=16)

    def binary(self, wanted: Wanted) -> bool:
        """Whether an output is to be binary."""
        return bool(wanted.parameters.get("binary_data", self.parameters.get("binary_data_output", False)))


def read(body: bytes, header: str | None) -> tuple[Inference, dict[str, list[str]]]:
    """A request, and the strings of each of its inputs.

    Args:
        body: JSON, and behind it the binary tensors in the order of the inputs.
        header: the value of `HEADER`: how long the JSON is; None where that is all.

    Raises:
        Rejected: it is not of the protocol, or an input is not of strings.
    """
    length = len(body)
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) < 12 and int(header) <= length):
            raise Malformed(f"{HEADER}: expected 0 to {length}, the length of the body, got {header[:50]!r}")
        length = int(header)
    asked = parsed(Inference, body[:length])
    values: dict[str, list[str]] = {}
    at = length
    for tensor in asked.inputs:
        if tensor.name in values:
            raise invalid("inputs", "each name once", tensor.name)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            values[tensor.name] = _of_json(tensor)
            continue
        if type(size) is not int or not 0 <= size <= len(body) - at:
            raise invalid(f"inputs.{tensor.name}.parameters.binary_data_size", f"0 to {len(body) - at}, the bytes that are left", size)
        values[tensor.name] = _of_bytes(tensor, body[at : at + size])
        at += size
    if at != len(body):
        raise Malformed(f"body: expected {at} bytes by the sizes of its inputs, got {len(body)}")
    return asked, values


def write(head: dict[str, Any], outputs: Sequence[tuple[str, np.ndarray, bool]]) -> tuple[bytes, int | None]:
    """A response, and how long its JSON is where something binary is behind it.

    Args:
        head: everything but the outputs.
        outputs: name, float32 ``[n]``, whether it is to be binary.
    """
    described: list[dict[str, Any]] = []
    behind = b""
    for name, values, binary in outputs:
        tensor: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [len(values)]}
        if binary:
            content = values.astype("<f4").tobytes()
            tensor["parameters"] = {"binary_data_size": len(content)}
            behind += content
        else:
            tensor["data"] = values.astype(np.float64).tolist()
        described.append(tensor)
    content = orjson.dumps({**head, "outputs": described})
    return content + behind, len(content) if any(binary for _, _, binary in outputs) else None


def _of_json(tensor: Tensor) -> list[str]:
    if tensor.data is None:
        raise invalid(f"inputs.{tensor.name}.data", "a list of strings, or binary_data_size", None)
    for value in tensor.data:
        if not isinstance(value, str):
            raise invalid(f"inputs.{tensor.name}.data", "strings", value)
    return _checked(tensor, tensor.data)


def _of_bytes(tensor: Tensor, content: bytes) -> list[str]:
    """BYTES: of each element the length, four bytes little-endian, and then its bytes."""
    found, at = [], 0
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at) if len(content) - at >= 4 else (len(content),)
        if size > len(content) - at - 4:
            raise invalid(f"inputs.{tensor.name}", "elements of the lengths that stand before them", content[at : at + 8])
        try:
            found.append(content[at + 4 : at + 4 + size].decode())
        except UnicodeDecodeError:
            raise invalid(f"inputs.{tensor.name}", "strings in UTF-8", content[at + 4 : at + 4 + size]) from None
        at += 4 + size
    return _checked(tensor, found)


def _checked(tensor: Tensor, values: list[str]) -> list[str]:
    where = f"inputs.{tensor.name}"
    if tensor.datatype != "BYTES":
        raise invalid(f"{where}.datatype", "'BYTES'", tensor.datatype)
    if tensor.shape != [len(values)] or not 1 <= len(values) <= MOST:
        raise invalid(f"{where}.shape", f"[{len(values)}], the number of values, from 1 to {MOST}", tensor.shape)
    for value in values:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid(where, "strings that UTF-8 has", value) from None
    return values
