# SPDX-License-Identifier: Apache-2.0
"""What the tests of models over codes share: histories, codes, and small models."""

import torch

from recsys.core.components import get
from recsys.core.config import validate
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.items import ItemTable

N, SIZES = 60, (5, 5, 5)
HISTORIES = [[1, 2, 4], [], [5, 6, 7, 8, 9, 10], [5]]
TARGETS = [(0, 0, 1), (0, 2, 4), (0, 2, 5), (2, 5, 10), (1, 0, 6), (3, 1, 8)]
SMALL = {
    "tiger": {"dim": 16, "layers": 2, "heads": 2, "head_dim": 8, "ffn": 32, "dropout": 0.0, "max_length": 6},
    "rpg": {"dim": 16, "blocks": 2, "heads": 2, "dropout": 0.0, "max_length": 6, "init_std": 0.2},
    "recgpt": {"dim": 16, "blocks": 2, "heads": 2, "dropout": 0.0, "max_length": 6, "init_std": 0.2},
}


def batch_of(histories: list[list[int]], targets: list[tuple[int, int, int]] | None = None) -> SequenceBatch:
    """Histories, and targets as (row, events seen, item)."""
    items = torch.tensor([i for h in histories for i in h], dtype=torch.int64)
    offsets = torch.tensor([0, *(len(h) for h in histories)]).cumsum(0)
    if targets is None:
        return SequenceBatch(items, offsets)
    rows, positions, wanted = (torch.tensor(column, dtype=torch.int64) for column in zip(*targets, strict=True))
    return SequenceBatch(items, offsets, wanted, rows, positions)


def table_of(count: int = N, sizes: tuple[int, ...] = SIZES, tokenizer: str = "t") -> CodeTable:
    """Drawn codes; a larger table begins with the smaller one."""
    random = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(0, size, (2 * N,), generator=random) for size in sizes], 1)
    return CodeTable(codes[:count], sizes, tokenizer)


def build(name: str, table: CodeTable | None = None, **config: object) -> CodeRetriever:
    """A small model by its registered name."""
    torch.manual_seed(0)
    cls = get("retriever", name)
    model: CodeRetriever = cls(validate(cls.Config, {"name": name, **SMALL[name], **config}), items_of(table or table_of()))
    return model


def items_of(table: CodeTable) -> ItemTable:
    """Items with these codes and with drawn text; a larger table begins with the smaller one."""
    text = torch.randn(2 * N, 4 * table.levels, generator=torch.Generator().manual_seed(1))
    return ItemTable(len(table), torch.ones(len(table), dtype=torch.bool), text=text[: len(table)], codes=table)
