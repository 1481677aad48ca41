# SPDX-License-Identifier: Apache-2.0
"""How much of a training step of TokenMixer-Large is matrix products?

B = 2048 rows, T = 16 tokens of width D = 256, two blocks (one with ``--quick``), 26 tables of 100,000 rows. The denominator of each
share is the step's own list of matrix products run alone, with operands of the same shapes, strides and dtype, in turns with the step
itself; so a share of 1 would mean that nothing but matrix products takes time. ``torch.compile`` on and off are both shown; the checks
take the better one.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.frame import Check, Ratio, Result, ratio
from benchmarks.gemms import Products, seconds
from recsys.core.memory import keep_freed_memory
from recsys.data.batch import RankingBatch
from recsys.data.encode import Encoder
from recsys.data.encoding.config import EncoderConfig
from recsys.data.loader import ParquetLoader
from recsys.data.spec import InputSpec, TableSpec
from recsys.embedding.tables import EmbeddingTables, dense_parameters
from recsys.ranking.models import TokenMixerLarge
from recsys.training.optim import DenseOptimizer
from recsys.training.progress import track

ROWS, TOKENS, DIM, BLOCKS = 2048, 16, 256, 2
FIELDS, DENSE, TABLE, WIDTH = 26, 13, 100_000, 16
CATEGORICAL, NUMERIC = tuple(f"c{i}" for i in range(FIELDS)), tuple(f"d{i}" for i in range(DENSE))
BOUNDS = {"fp32_step": 0.70, "bf16_step": 0.65, "fp32_blocks": 0.85, "bf16_blocks": 0.80}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(blocks: int = BLOCKS, compiled: bool = False) -> TokenMixerLarge:
    """The model: 15 groups of fields and the global token."""
    spec = InputSpec(tables=tuple(TableSpec(name=c, rows=TABLE, bags=(c,)) for c in CATEGORICAL), dense=NUMERIC, tasks=("click",))
    groups = {f"token{i}": tuple(part) for i, part in enumerate(np.array_split(CATEGORICAL, TOKENS - 2))} | {"numeric": NUMERIC}
    torch.manual_seed(0)
    config = TokenMixerLarge.Config.model_validate(
        {
            "tokenizer": {"groups": groups},
            "dim": DIM,
            "blocks": blocks,
            "auxiliary": None,
            "embedding": EmbeddingTables.Config(dim=WIDTH, optimizer="rowwise_adagrad"),
        }
    )
    model = TokenMixerLarge(config, spec)
    if compiled:
        model.compile_dense()
    return model.train()


def batch(rows: int = ROWS, seed: int = 0) -> RankingBatch:
    """One batch in memory."""
    random = np.random.default_rng(seed)
    values = torch.from_numpy((random.zipf(1.2, FIELDS * rows) - 1) % TABLE)
    sparse = KeyedJaggedTensor(keys=list(CATEGORICAL), values=values, lengths=torch.ones(FIELDS * rows, dtype=torch.int32))
    nothing = KeyedJaggedTensor(keys=[], values=torch.empty(0, dtype=torch.int64), lengths=torch.empty(0, dtype=torch.int32))
    dense = torch.from_numpy(random.normal(size=(rows, DENSE)).astype(np.float32))
    return RankingBatch(sparse, nothing, dense, torch.from_numpy(random.integers(0, 2, (rows, 1)).astype(np.float32)))


def run(*, quick: bool) -> Result:
    """Run the benchmark."""
    keep_freed_memory()  # as the trainer does
    pairs, blocks = (5, 1) if quick else (9, BLOCKS)
    shares: dict[tuple[str, bool], dict[str, Ratio]] = {}
    for dtype in track(list(DTYPES), "shares"):
        for compiled in (False, True):
            shares[dtype, compiled] = _shares(dtype, compiled, pairs, blocks)
    parts = {dtype: _parts(dtype, blocks) for dtype in DTYPES}
    loader, step = _loader_cpu(), _step_cpu()
    rows = [
        _row(dtype, "on" if compiled else "off", f"products ÷ {name}", str(share))
        for (dtype, compiled), found in shares.items()
        for name, share in found.items()
    ]
    for dtype, found in parts.items():
        rows += [_row(dtype, "off", name, f"{1e3 * v:.0f} ms, {v / found['step']:.1%} of the step") for name, v in found.items()]
    checks = []
    for name, bound in BOUNDS.items():
        dtype, part = name.split("_")
        best = max((shares[dtype, compiled][part] for compiled in (False, True)), key=lambda share: share.low)
        checks.append(best.at_least(name, bound))
    checks.append(Check("loader_cpu_share", round(loader / step, 4), at_most=0.05, note="CPU seconds of loader ÷ step, per batch"))
    memory = _memory()
    rows += [_row("fp32", "off", f"kept for the backward pass, {n} blocks", f"{size / 2**20:.1f} MiB") for n, size in memory.items()]
    details = {"parts_seconds": parts, "saved_bytes_by_depth": memory, "loader_cpu_seconds": loader, "step_cpu_seconds": step}
    return Result("ranking_mfu", rows, checks, details)


def _shares(dtype: str, compiled: bool, pairs: int, blocks: int) -> dict[str, Ratio]:
    """Products ÷ step, and products ÷ blocks, in turns."""
    plain, model, data = build(blocks), build(blocks, compiled), batch()
    found = {}
    for name, work_of in (("step", _step), ("blocks", _blocks)):
        products, work = Products(work_of(plain, data, dtype)), work_of(model, data, dtype)
        if not 0.99 < products.covered < 1.01:
            raise ValueError(f"{name}: expected matrix products with all FLOPs of the work, got {products.covered:.1%} of them")
        work()  # compiles
        products.run()
        alone, whole = [], []
        for _ in range(pairs):
            whole.append(seconds(work))
            alone.append(seconds(products.run))
        found[name] = ratio(alone, whole)
    return found


def _cast(dtype: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()


def _step(model: TokenMixerLarge, data: RankingBatch, dtype: str) -> Callable[[], None]:
    """A whole training step: tables, forward, backward, both optimizers."""
    optimizer = DenseOptimizer(learning_rate=1e-4).build({str(i): p for i, p in enumerate(dense_parameters(model))})

    def step() -> None:
        optimizer.zero_grad()
        with _cast(dtype):
            loss, _ = model.loss(data)
        loss.backward()
        optimizer.step()

    return step


def _blocks(model: TokenMixerLarge, data: RankingBatch, dtype: str) -> Callable[[], None]:
    """The blocks alone, forward and backward, as the step drives them."""
    tokens = torch.randn(TOKENS, ROWS, DIM, dtype=DTYPES[dtype]).transpose(0, 1).requires_grad_()
    gradient = torch.randn_like(tokens)

    def blocks() -> None:
        for parameter in model.stack.parameters():
            parameter.grad = None
        with _cast(dtype):
            (*_, top) = model.stack(tokens)
        top.backward(gradient.to(top.dtype))

    return blocks


def _parts(dtype: str, blocks: int) -> dict[str, float]:
    """Seconds of each part of an eager step, run by itself: medians of 3."""
    model, data = build(blocks), batch()
    fields = model.fields(model.embed(data), data).detach().requires_grad_()
    tokens = torch.randn(TOKENS, ROWS, DIM, dtype=DTYPES[dtype]).transpose(0, 1).requires_grad_()
    mixer, per_token = model.stack.blocks[0].mixer, [(b.mixed, b.token) for b in model.stack.blocks]
    optimizer = DenseOptimizer(learning_rate=1e-4).build({str(i): p for i, p in enumerate(dense_parameters(model))})

    def both(module: Callable[[Any], Tensor], x: Any) -> Callable[[], None]:
        def work() -> None:
            with _cast(dtype):
                y = module(x)
            y.float().sum().backward()

        return work

    def embed() -> None:
        model.embed(data).pooled.values().sum().backward()

    def mixing() -> None:
        for _ in range(blocks):
            both(lambda x: mixer.revert(mixer(x)), tokens)()

    def networks() -> None:
        for mixed, token in per_token:
            both(mixed, tokens)()
            both(token, tokens)()

    work = {
        "embedding": embed,
        "tokenizer": both(model.tokenizer, fields),
        "mixing": mixing,
        "per_token_networks": networks,
        "head": both(model.readout, tokens),
        "optimizer": optimizer.step,
        "step": _step(model, data, dtype),
    }
    for part in work.values():
        part()
    return {name: statistics.median(seconds(part) for _ in range(3)) for name, part in work.items()}


def _memory() -> dict[int, int]:
    """Bytes that autograd saves for the backward pass, by depth: parameters are not counted."""
    found, data = {}, batch(rows=256)
    for blocks in (1, 2, 4, 8):
        model = build(blocks)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = model.loss(data)  # alive, so that no address is used twice
        found[blocks] = sum(saved.values())
        del loss
    return found


def _row(dtype: str, compiled: str, what: str, value: str) -> dict[str, str]:
    return {"dtype": dtype, "torch.compile": compiled, "what": what, "value": value}


def _loader_cpu() -> float:
    """CPU seconds that the loader takes for one batch, from Parquet to tensors."""
    random, rows = np.random.default_rng(0), 16 * ROWS
    columns: dict[str, Any] = {c: (random.zipf(1.2, rows) - 1) % TABLE for c in CATEGORICAL}
    columns |= {d: random.normal(size=rows) for d in NUMERIC} | {"click": random.integers(0, 2, rows)}
    features = [{"kind": "categorical", "feature": c} for c in CATEGORICAL]
    features += [{"kind": "dense", "feature": d, "indicator": False} for d in NUMERIC]
    config = EncoderConfig.model_validate({"features": features, "tasks": [{"name": "click", "feature": "click"}]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        frame = pl.DataFrame(columns).with_columns(pl.col(c).cast(pl.String) for c in CATEGORICAL)
        frame.write_parquet(path, row_group_size=4 * ROWS)
        encoder = Encoder.fit(config, frame.to_arrow())
        loader: ParquetLoader[RankingBatch] = ParquetLoader([path], encoder, batch_size=ROWS)
        for _ in loader:
            pass
        started = time.process_time()
        count = sum(1 for _ in loader)
        return (time.process_time() - started) / count


def _step_cpu() -> float:
    """CPU seconds of one eager fp32 step."""
    step = _step(build(), batch(), "fp32")
    step()
    started = time.process_time()
    for _ in range(3):
        step()
    return (time.process_time() - started) / 3
