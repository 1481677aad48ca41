# SPDX-License-Identifier: Apache-2.0
"""Int8 tables against the float32 ones, a quantiser written out in numpy, and scikit-learn's metrics."""

import copy
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.core.errors import DataError, RecsysError
from recsys.data.batch import RankingBatch
from recsys.data.spec import InputSpec, TableSpec
from recsys.embedding.quantize import QuantizedTables, error_bound, quality, quantize
from recsys.embedding.tables import EmbeddingTables

SPEC = InputSpec(
    tables=(
        TableSpec(name="genre", rows=60, bags=("genres", "top_genre")),
        TableSpec(name="item", rows=90, sequences=("history", "target")),
        TableSpec(name="city", rows=40, bags=("city",)),
        TableSpec(name="rating", rows=50, sequences=("ratings",)),
    ),
    tasks=("click", "buy"),
)
TABLE_OF = {key: table for table in SPEC.tables for key in (*table.bags, *table.sequences)}


def make(**options: Any) -> EmbeddingTables:
    torch.manual_seed(0)
    return EmbeddingTables(SPEC, EmbeddingTables.Config(**({"dim": 8, "dims": {"city": 16, "rating": 4}, "init_std": 0.3} | options)))


def random_batch(seed: int = 1, rows: int = 50, longest: int = 5) -> RankingBatch:
    generator = torch.Generator().manual_seed(seed)

    def keyed(keys: tuple[str, ...]) -> KeyedJaggedTensor:
        lengths = torch.randint(0, longest + 1, (len(keys), rows), generator=generator)
        values = [torch.randint(0, TABLE_OF[k].rows, (int(n.sum()),), generator=generator) for k, n in zip(keys, lengths, strict=True)]
        return KeyedJaggedTensor(keys=list(keys), values=torch.cat(values), lengths=lengths.flatten())

    labels = torch.randint(0, 2, (rows, 2), generator=generator).float()
    return RankingBatch(keyed(SPEC.bag_keys), keyed(SPEC.sequence_keys), torch.empty(rows, 0), labels)


def weights(tables: nn.Module) -> dict[str, Tensor]:
    return {name.split(".")[-2]: w.detach() for name, w in tables.named_parameters()}


def flat(embedded: Any) -> dict[str, Tensor]:
    return embedded.pooled.to_dict() | {key: jagged.values() for key, jagged in embedded.sequences.items()}


def by_hand(weight: Tensor) -> np.ndarray:
    """The stored row, read back, in numpy."""
    w = weight.numpy()
    offset = w.min(1).astype(np.float16).astype(np.float32)
    scale = ((w.max(1) - offset) / 255).astype(np.float16).astype(np.float32)
    q = np.clip(np.rint((w - offset[:, None]) / np.where(scale == 0, 1, scale)[:, None]), 0, 255)
    return q * scale[:, None] + offset[:, None]


@pytest.mark.parametrize("shift", [0.0, 3.0, -40.0])
@pytest.mark.parametrize("std", [1e-4, 0.3, 20.0])
def test_the_error_is_within_half_a_step(std: float, shift: float) -> None:
    tables = make(init_std=std)
    for w in weights(tables).values():
        w += shift
        w[3] = 0.25
    read = quantize(tables).dequantised()
    for name, w in weights(tables).items():
        error = (read[name].double() - w.double()).abs().amax(1)
        assert bool((error <= error_bound(w)).all()), (name, (error / error_bound(w)).max())
        low, high = w.double().aminmax(dim=1)
        eps = (low.abs() + high - low) * 2**-11 + 2**-17  # what fp16 scales and offsets add
        assert bool((error <= (high - low) / 255 / 2 + eps).all())
        step = ((high - low) / 255).clamp(min=2**-24)
        near = torch.from_numpy(by_hand(w)).double()
        assert bool(((read[name].double() - near).abs().amax(1) <= step * 1.01 + eps).all())


def test_rows_alike_and_the_ends_of_a_row_are_kept() -> None:
    tables = make()
    weights(tables)["city"][5] = 0.25
    weights(tables)["city"][6] = torch.linspace(-1, 1, 16)
    read = quantize(tables).dequantised()["city"]
    assert torch.equal(read[5], torch.full((16,), 0.25))
    torch.testing.assert_close(read[6, [0, -1]], torch.tensor([-1.0, 1.0]), rtol=0, atol=255 * 2**-18)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_the_forward_pass_is_that_of_the_tables_read_back(pooling: str) -> None:
    tables = make(pooling=pooling)
    quantized = quantize(tables)
    same = make(pooling=pooling)
    for name, w in weights(same).items():
        w.copy_(quantized.dequantised()[name])
    for batch in (random_batch(), random_batch(2, rows=1), random_batch(3, longest=0)):
        embedded, expected = quantized(batch), same(batch)
        assert tuple(embedded.pooled.keys()) == SPEC.bag_keys and tuple(embedded.sequences) == SPEC.sequence_keys
        for key, vectors in flat(expected).items():
            got = flat(embedded)[key]
            assert got.dtype == torch.float32 and not got.requires_grad
            torch.testing.assert_close(got, vectors, rtol=1e-4, atol=1e-5)
        for key, jagged in expected.sequences.items():
            assert torch.equal(embedded.sequences[key].lengths(), jagged.lengths())
        with torch.inference_mode():
            assert all(torch.equal(v, flat(embedded)[key]) for key, v in flat(quantized(batch)).items())
    error = flat(quantized(random_batch()))["genres"] - flat(tables(random_batch()))["genres"]
    assert 0 < float(error.detach().abs().max()) < 0.02


def test_memory_is_counted() -> None:
    quantized = quantize(make())
    width = {"genre": 8, "item": 8, "city": 16, "rating": 4}
    assert quantized.bytes == sum(t.rows * (4 + width[t.name]) for t in SPEC.tables)
    assert quantized.bytes == sum(t.numel() * t.element_size() for t in quantized.state_dict().values())
    assert quantized.float_bytes == sum(w.numel() * 4 for w in make().parameters())


def test_the_state_is_plain_tensors(tmp_path) -> None:
    quantized = quantize(make())
    state = quantized.state_dict()
    assert list(state) == ["pooled.genre", "pooled.city", "unpooled.item", "unpooled.rating"]
    safetensors.torch.save_file(state, tmp_path / "tables.safetensors")
    empty = QuantizedTables(SPEC, make().config)
    empty.load_state_dict(safetensors.torch.load_file(tmp_path / "tables.safetensors"))
    batch = random_batch()
    for other in (empty, copy.deepcopy(quantized)):
        assert all(torch.equal(v, flat(quantized(batch))[key]) for key, v in flat(other(batch)).items())
    other.state_dict()["pooled.city"].zero_()
    assert torch.equal(quantized.state_dict()["pooled.city"], state["pooled.city"]) and not other.train().training
    with pytest.raises(RecsysError, match="assign=False"):
        empty.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)


@pytest.mark.parametrize("key", ["city", "target"])
@pytest.mark.parametrize("row", [-1, None])
def test_a_row_beyond_the_table_is_an_error(key: str, row: int | None) -> None:
    batch = random_batch()
    part = batch.sparse if key == "city" else batch.sequences
    part[key].values()[0] = TABLE_OF[key].rows if row is None else row
    with pytest.raises(RuntimeError, match=f"{key}: expected rows from 0 to"):
        quantize(make())(batch)


def test_weights_that_fp16_cannot_scale_are_refused() -> None:
    for value in (1e6, float("nan")):
        tables = make()
        weights(tables)["item"][4, 2] = value
        with pytest.raises(RecsysError, match="'item': expected finite weights within"):
            quantize(tables)


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = make(init_std=1.0)
        self.head = nn.Linear(16, 2)

    @torch.no_grad()
    def predict(self, batch: RankingBatch) -> Tensor:
        return torch.sigmoid(self.head(self.tables(batch).pooled["city"]))


def test_quality_is_that_of_scikit_learn() -> None:
    scorer = Scorer().eval()
    quantized, batches = quantize(scorer.tables), [random_batch(1), random_batch(2)]
    batches[0].labels[3, 0] = float("nan")
    result = quality(scorer, quantized, batches)
    assert isinstance(scorer.tables, EmbeddingTables) and tuple(result) == SPEC.tasks
    labels = torch.cat([b.labels for b in batches])
    plain = torch.cat([scorer.predict(b) for b in batches])
    scorer.tables = quantized
    small = torch.cat([scorer.predict(b) for b in batches])
    for i, task in enumerate(SPEC.tasks):
        known = labels[:, i].isfinite()
        y = labels[known, i].numpy()
        for got, p in zip(zip(result[task].auc, result[task].log_loss, strict=True), (plain, small), strict=True):
            assert got == pytest.approx((roc_auc_score(y, p[known, i]), log_loss(y, p[known, i].double())))
        assert result[task].largest_change == pytest.approx(float((plain - small)[known, i].abs().max()))
        assert 0 < result[task].largest_change < 0.05
    scorer.tables = make()
    with pytest.raises(DataError, match="expected at least one"):
        quality(scorer, quantized, [])
    with pytest.raises(DataError, match="labels"):
        quality(scorer, quantized, [RankingBatch(batches[0].sparse, batches[0].sequences, batches[0].dense)])
