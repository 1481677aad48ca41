# SPDX-License-Identifier: Apache-2.0
"""Tables that are only read against the ones that were trained."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from recsys.core.errors import RecsysError
from recsys.embedding.quantize import quantize
from recsys.embedding.served import ServedTables, new_tables, read_only_tables
from recsys.embedding.tables import EmbeddingTables
from tests.recsys.embedding.test_quantize import SPEC, TABLE_OF, flat, make, random_batch


def served(tables: EmbeddingTables, state: dict[str, torch.Tensor] | None = None) -> ServedTables:
    found = ServedTables(SPEC, tables.config)
    found.load_state_dict(tables.state_dict() if state is None else state, assign=True)
    return found.eval()


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_a_batch_gives_what_the_trained_tables_give(pooling: str) -> None:
    tables = make(pooling=pooling)
    ours = served(tables)
    assert ours.widths == tables.widths
    for batch in (random_batch(), random_batch(2, rows=1), random_batch(3, longest=0)):
        expected, got = tables(batch), ours(batch)
        assert tuple(got.pooled.keys()) == SPEC.bag_keys and tuple(got.sequences) == SPEC.sequence_keys
        for key, vectors in flat(expected).items():
            torch.testing.assert_close(flat(got)[key], vectors.detach(), rtol=0, atol=1e-6)
        for key, jagged in expected.sequences.items():
            assert torch.equal(got.sequences[key].lengths(), jagged.lengths())
            assert torch.equal(got.sequences[key].values(), jagged.values())


def test_the_tensors_of_a_state_are_the_tables(tmp_path: Path) -> None:
    tables = make()
    safetensors.torch.save_file(tables.state_dict(), tmp_path / "tables.safetensors")
    state = safetensors.torch.load_file(tmp_path / "tables.safetensors")
    ours = served(tables, state)
    assert {name: w.data_ptr() for name, w in ours.state_dict().items()} == {name: w.data_ptr() for name, w in state.items()}
    assert not any(w.requires_grad for w in ours.parameters()) and not ours.train().training


def test_before_a_state_is_loaded_there_is_no_memory() -> None:
    config = make().config
    assert type(new_tables(SPEC, config, torch.device("cpu"))) is EmbeddingTables
    with read_only_tables():
        made = new_tables(SPEC, config, torch.device("cpu"))
    assert isinstance(made, ServedTables) and all(w.is_meta for w in made.parameters())
    assert type(new_tables(SPEC, config, torch.device("cpu"))) is EmbeddingTables


def test_int8_tables_can_be_made_of_them() -> None:
    tables = make()
    one, two = quantize(tables), quantize(served(tables))
    assert all(torch.equal(rows, two.state_dict()[name]) for name, rows in one.state_dict().items())


@pytest.mark.parametrize("key", ["city", "target"])
@pytest.mark.parametrize("row", [-1, None])
def test_a_row_beyond_the_table_is_an_error(key: str, row: int | None) -> None:
    batch = random_batch()
    part = batch.sparse if key == "city" else batch.sequences
    part[key].values()[0] = TABLE_OF[key].rows if row is None else row
    with pytest.raises((RuntimeError, IndexError)):
        served(make())(batch)


def test_managed_ids_are_refused() -> None:
    config = make().config.model_copy(update={"managed": {"city": None}})
    with pytest.raises(RecsysError, match=r"embedding\.managed: expected none in tables that are only read, got \['city'\]"):
        ServedTables(SPEC, config)
