# SPDX-License-Identifier: Apache-2.0
"""HISA in the token efficiency benchmark: counted and closed multiply-adds, and the overlap of the choices."""

import math

import pytest
import torch

from benchmarks.token_efficiency import indexing, indexing_real
from benchmarks.token_efficiency.indexing import BLOCK, BLOCKS, HEADS, KEEP, QUERIES, WIDTH, Setting, inputs, iou_check, macs, overlap
from recsys.efficiency.attention.hisa import FlatIndexer, HisaIndexer
from recsys.retrieval import transformer
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import SASRec


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_scored_keys_are_the_counted_products():
    length, each = 16_384, HEADS * WIDTH * QUERIES
    index, ours = inputs(length, 0.2), Setting(length).indexer()
    assert macs(FlatIndexer(KEEP), index) == length * each
    assert macs(ours, index) == (ours.scored_keys(length) - 1) * each  # the own block has no mean
    assert ours.scored_keys(length) == length // BLOCK + BLOCK * BLOCKS


def test_sharing_scores_the_means_once():
    length, each = 16_384, HEADS * WIDTH
    shared = Setting(length, BLOCKS, QUERIES).indexer()
    assert macs(shared, inputs(length, 0.2)) == (length // BLOCK - 1 + QUERIES * BLOCK * BLOCKS) * each


def test_all_blocks_overlap_wholly_and_few_do_not():
    index = inputs(4096, math.inf)
    assert torch.equal(overlap(HisaIndexer(256, BLOCK, 32), index), torch.ones(QUERIES))
    assert overlap(HisaIndexer(256, BLOCK, 4), index).mean() < 0.5


def test_overlap_falls_with_coherence():
    few = HisaIndexer(256, BLOCK, 8)
    tight, loose, none = (float(overlap(few, inputs(8192, noise)).mean()) for noise in (0.05, 0.5, math.inf))
    assert tight > 0.95 > loose > none


def test_measure_gives_every_check(monkeypatch):
    monkeypatch.setattr(indexing, "beside", lambda dense, ours, pairs: None)
    monkeypatch.setattr(indexing, "SETTINGS", (indexing.AT_32K, indexing.AT_128K))
    rows, checks = indexing.measure(quick=True)
    assert {check.name: (check.at_least, check.at_most) for check in checks} == {
        "hisa_32k": (2.2, None),
        "hisa_128k": (4.5, None),
        "hisa_iou": (0.99, None),
    }
    assert all(math.isfinite(check.value) and check.note for check in checks)
    assert {row.module for row in rows} == {"HISA"}


def test_coherence_is_stated():
    assert "cosine 0.98" in iou_check(16_384, seeds=1).note


def test_the_keys_of_a_model_are_those_that_its_attention_reads(monkeypatch):
    model = SASRec(SASRec.Config(dim=16, heads=2, blocks=2, max_length=12), ItemTable(30, torch.ones(30, dtype=torch.bool))).eval()
    windows, seen = torch.randint(0, 30, (5, 12)), []
    attend = transformer.jagged_attention

    def look(q, k, v, offsets, **how):
        seen.append([x.unflatten(0, (5, 13)).transpose(1, 2) for x in (q, k)])
        return attend(q, k, v, offsets, **how)

    monkeypatch.setattr(transformer, "jagged_attention", look)
    with torch.no_grad():
        model.sequence(model._read(windows), torch.full((5,), 13))
    read, seen = list(seen), []
    for number, head, query, key in indexing_real.attention_inputs(model, windows):
        torch.testing.assert_close(query, read[number][0][:, head])
        torch.testing.assert_close(key, read[number][1][:, head])


def test_both_choose_the_same_where_all_blocks_are_looked_into():
    drawn = torch.Generator().manual_seed(0)
    query, keys = torch.randn(8, generator=drawn), torch.randn(64, 8, generator=drawn)
    assert indexing_real.agreement(query, keys, 10, 4, 16)[0] == 1.0
    assert indexing_real.agreement(query, keys, 10, 8, 2)[0] < 1.0
