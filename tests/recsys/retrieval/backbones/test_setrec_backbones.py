# SPDX-License-Identifier: Apache-2.0
"""SETRec over pretrained language models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from recsys.core.components import get
from recsys.core.config import parse
from recsys.core.errors import ConfigError
from recsys.retrieval.catalogue import Catalogue, DenseIndex
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SETRec
from tests.recsys.retrieval.backbones.tiny import DIM, KINDS, PROMPT, save
from tests.recsys.retrieval.coded import batch_of

N, D_TEXT, D_CF = 12, 7, 5
HISTORIES = [[1, 2, 4], [], [5, 6, 7, 8, 9, 10], [5]]
TARGETS = [(0, 0, 1), (0, 2, 4), (2, 5, 10), (2, 4, 9), (1, 0, 6), (3, 1, 6), (2, 6, 11)]

each_kind = pytest.mark.parametrize("kind", KINDS)


def items():
    features = torch.randn(N, D_TEXT + D_CF, generator=torch.Generator().manual_seed(0))
    return ItemTable(N, torch.arange(N) != 3, features[:, :D_TEXT], features[:, D_TEXT:])


def build(kind, folder, backbone=None, **config):
    torch.manual_seed(0)
    given = {"name": kind, "pretrained": str(folder), **PROMPT, **(backbone or {})}
    data = {"max_length": 6, "semantic_tokens": 3, "ae_hidden": [8, 6], "backbone": given, **config}
    return SETRec(parse(SETRec.Config, data, source="recipe"), items())


def scores(model):
    with torch.no_grad():
        return model.eval().encode(batch_of(HISTORIES)).flat() @ model.item_vectors().T


@each_kind
def test_the_width_is_the_backbones(folders, kind):
    model = build(kind, folders[kind], dim=64)
    assert isinstance(model.transformer, get("set_backbone", kind))
    assert model.encode(batch_of(HISTORIES)).values.shape == (4, 4, DIM)
    assert model.item_vectors().shape == (N, 4 * DIM)


@each_kind
@pytest.mark.parametrize("backbone", [{}, {"release": True}, {"lora": {}}])
def test_the_loss_falls(folders, kind, backbone):
    model = build(kind, folders[kind], backbone).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    batch = batch_of(HISTORIES, TARGETS)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, _ = model.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@each_kind
@pytest.mark.parametrize("release", [False, True])
def test_the_loss_of_all_prefixes_is_that_of_each_alone(folders, kind, release):
    model = build(kind, folders[kind], {"release": release}, reconstruction_weight=0.0)
    alone = [model.loss(batch_of([HISTORIES[row][:s]], [(0, s, item)]))[0] for row, s, item in TARGETS]
    torch.testing.assert_close(model.loss(batch_of(HISTORIES, TARGETS))[0], torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


@each_kind
def test_adapters_alone_train_beside_what_setrec_adds(folders, kind):
    model = build(kind, folders[kind], {"lora": {}})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    ours = {name for name in trained if not name.startswith("transformer.")}
    assert ours == {name for name, _ in model.named_parameters() if not name.startswith("transformer.")} >= {"queries"}
    assert all(".lora_" in name for name in trained - ours)
    model.loss(batch_of(HISTORIES, TARGETS))[0].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


@each_kind
def test_compressed_vectors_give_the_same_scores(folders, kind):
    plain, compressed = (build(kind, folders[kind], compress=compress) for compress in (False, True))
    compressed.load_state_dict(plain.state_dict())
    assert compressed.item_vectors().shape == (N, D_CF + 6 + 1)
    torch.testing.assert_close(scores(compressed), scores(plain), atol=1e-4, rtol=1e-4)


@each_kind
@pytest.mark.parametrize("backbone", [{}, {"lora": {}}, {"lora": {}, "dtype": "bfloat16"}])
def test_a_bundle_rebuilds_it_without_the_folder(tmp_path, kind, backbone):
    """A configuration in JSON and a file of tensors, as bundles have them."""
    save(kind, tmp_path / "model")
    model = build(kind, tmp_path / "model", backbone)
    shutil.rmtree(tmp_path / "model")
    kept = json.dumps(model.config.model_dump(mode="json"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.manual_seed(1)
    other = SETRec(parse(SETRec.Config, json.loads(kept), source="bundle"), items())
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(scores(other), scores(model), atol=1e-6, rtol=1e-6)
    view = Catalogue([str(row) for row in range(N)]).snapshot()
    index = DenseIndex.over(DenseIndex.Config(), model, view)
    assert index.meta.content_hash == other.fingerprint()


@each_kind
def test_targets_that_are_no_candidates_leave_nothing_to_predict(folders, kind):
    loss, _ = build(kind, folders[kind]).loss(batch_of([[]], [(0, 0, 3)]))
    loss.backward()
    assert loss == 0


@each_kind
def test_a_schedule_is_for_the_small_transformer(folders, kind):
    schedule = {"keep": {0: 0.5}, "scorer": {"name": "recency"}, "selector": {"name": "top_k"}}
    with pytest.raises(ConfigError, match=f"efficiency: schedule: a backbone cannot carry it, got '{kind}'"):
        build(kind, folders[kind], efficiency={"schedule": schedule})
