# SPDX-License-Identifier: Apache-2.0
"""What the tests of retrievers that save share: small models, by name, of whatever efficiency."""

from dataclasses import replace
from typing import Any

import torch

from recsys.core.components import get
from recsys.core.config import validate
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import Retriever
from recsys.retrieval.state import EncoderMemory
from tests.recsys.retrieval.coded import SMALL, items_of, table_of

LONG = [[1, 2, 4, 9, 9, 30, 31, 3, 8], [], [5, 6, 7, 8, 9, 10], [5]]
PLAIN = {"dim": 16, "blocks": 2, "heads": 2, "dropout": 0.0, "max_length": 6, "init_std": 0.2}
MODELS = {**SMALL, "sasrec": PLAIN, "hstu": PLAIN, "setrec": {**PLAIN, "semantic_tokens": 2, "ae_hidden": [8]}}
TOP = {"scorer": {"name": "transprune", "layers": [0]}, "selector": {"name": "top_k"}}
PRUNING = {"history": {"events": 4, "scorer": {"name": "context"}, "selector": {"name": "mmr"}}}


def build(name: str, **config: Any) -> Retriever:
    torch.manual_seed(0)
    cls = get("retriever", name)
    vectors = torch.randn(len(table_of()), 5, generator=torch.Generator().manual_seed(2))
    items = replace(items_of(table_of()), collaborative=vectors)
    model: Retriever = cls(validate(cls.Config, {"name": name, **MODELS[name], **config}), items)
    return model.eval()


def state_of(model: Retriever, batch: SequenceBatch) -> torch.Tensor:
    """What the model says of histories; zero where an encoder's memory holds padding."""
    state = model.encode(batch)
    return state.values * state.valid[..., None] if isinstance(state, EncoderMemory) else state.values
