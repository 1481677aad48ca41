# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: by device, by the committed table, by override; and how one sees which it was."""

import json
import logging

import pytest
import torch

from kernels import backend, native, paths
from kernels.op import Op, forward_backward
from kernels.registry import OPS
from kernels.rms_norm import cpu, rms_norm
from kernels.rms_norm import native as loop


@pytest.fixture
def a_table(monkeypatch: pytest.MonkeyPatch):
    """Sets the table that is looked into."""

    def put(table: paths.Table) -> None:
        monkeypatch.setattr(paths, "table", lambda: table)

    return put


def test_the_committed_table_names_what_there_is() -> None:
    table = json.loads(paths.FILE.read_text(encoding="utf-8"))
    folders = {op.call.__module__.split(".")[1] for op in OPS}
    for device, ops in table.items():
        assert device in ("cpu", "cuda")
        assert set(ops) <= folders
        assert {way for dtypes in ops.values() for buckets in dtypes.values() for way in buckets.values()} <= {"cpu", "native", "triton"}


@pytest.mark.parametrize(("elements", "expected"), [(0, 0), (1, 0), (3, 0), (4, 1), (15, 1), (16, 2), (4**9, 9), (4**9 - 1, 8)])
def test_a_bucket_is_a_power_of_four(elements: int, expected: int) -> None:
    assert paths.bucket(elements) == expected


def test_the_nearest_measured_size_is_taken(a_table) -> None:
    a_table({"cpu": {"rms_norm": {"float32": {"3": "cpu", "7": "native"}}}})

    def found(elements: int) -> str | None:
        return paths.look_up("cpu", "rms_norm", torch.float32, paths.bucket(elements))

    assert [found(4**n) for n in (0, 3, 5, 6, 7, 12)] == ["cpu", "cpu", "cpu", "native", "native", "native"]
    assert paths.look_up("cpu", "rms_norm", torch.bfloat16, 3) is None
    assert paths.look_up("cpu", "fsq", torch.float32, 3) is None
    assert paths.look_up("cuda", "rms_norm", torch.float32, 3) is None


def test_the_table_decides_on_the_cpu_and_an_override_over_it(a_table, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, 16)
    a_table({"cpu": {"rms_norm": {"float32": {"3": "cpu"}}}})
    assert backend.implementation("rms_norm", x) is cpu
    with backend.use("native"):
        assert backend.implementation("rms_norm", x) is loop
    with backend.use("reference"):
        assert backend.implementation("rms_norm", x) is None
    monkeypatch.setenv(backend.ENV, "native")
    assert backend.implementation("rms_norm", x) is loop
    a_table({})
    monkeypatch.delenv(backend.ENV)
    assert backend.implementation("rms_norm", x) is loop


def test_what_an_implementation_does_not_support_falls_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend.use("native"):
        assert backend.implementation("rms_norm", torch.ones(2, 3, dtype=torch.float64)) is cpu
        assert backend.implementation("int8_pooling", torch.ones(2, 3)).__name__ == "kernels.int8_pooling.cpu"
        monkeypatch.setattr(native, "load", lambda _: None)
        assert backend.implementation("rms_norm", torch.ones(2, 3)) is cpu


def test_other_devices_take_torch_operations() -> None:
    assert backend.implementation("rms_norm", torch.ones(2, 3, device="meta")) is cpu


def test_choices_are_recorded_and_logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(5, 64), torch.ones(64)
    with backend.record() as ran, backend.use("cpu"):
        rms_norm(x, weight)
    rms_norm(x, weight)
    assert ran == {backend.Choice("rms_norm", "cpu", "float32", 4, "cpu")}
    monkeypatch.setenv(backend.LOG_ENV, "1")
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.WARNING), backend.use("cpu"):
        rms_norm(x, weight)
        rms_norm(x, weight)
    assert caplog.messages == ["rms_norm of float32 on cpu, 4^4 elements: cpu"]


def test_an_unknown_or_impossible_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    monkeypatch.setenv(backend.ENV, "cuda")
    with pytest.raises(RuntimeError, match="unknown backend 'cuda', expected one of reference, cpu, native, triton"):
        backend.choose("rms_norm", x)
    monkeypatch.setenv(backend.ENV, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="expected a CUDA tensor, or TRITON_INTERPRET=1"):
        backend.choose("rms_norm", x)
    for way in ("cpu", "native"):
        monkeypatch.setenv(backend.ENV, way)
        with pytest.raises(RuntimeError, match=f"backend '{way}' was asked for on meta: expected a CPU tensor"):
            backend.choose("rms_norm", x.to("meta"))


@pytest.mark.parametrize(
    "op", [op for op in OPS if (paths.FILE.parent / op.call.__module__.split(".")[1] / "native.py").is_file()], ids=lambda op: op.name
)
def test_loops_give_the_same_bits_on_any_number_of_threads(op: Op) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            inputs = op.inputs(op.shapes[3], torch.float32, torch.Generator().manual_seed(0))
            with backend.use("native"):
                values, gradients = forward_backward(op.call, inputs)
            found.append((*values, *gradients))
    finally:
        torch.set_num_threads(before)
    products = {"token_swiglu"}  # of PyTorch's own, which divides them among threads
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **({} if op.name in products else {"rtol": 0, "atol": 0}))
