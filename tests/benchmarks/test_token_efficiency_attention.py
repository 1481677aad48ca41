# SPDX-License-Identifier: Apache-2.0
"""Attention in the token efficiency benchmark: closed multiply-adds against counted ones, peak memory, losses."""

import math

import pytest
import torch

from benchmarks.frame import Ratio
from benchmarks.token_efficiency import attention, attention_decoding, attention_prefill
from benchmarks.token_efficiency.attention_decoding import fasa, fasa_counted, fasa_macs, frequent, select_counted, select_macs
from benchmarks.token_efficiency.attention_memory import PeakBytes, eager_attention, eager_peak
from benchmarks.token_efficiency.attention_planted import loss, rotated, sessions, skewed, topical, weights
from benchmarks.token_efficiency.attention_prefill import (
    HEADS,
    WIDTH,
    biformer,
    choice_loss,
    counted,
    dense_macs,
    dropped,
    peaks,
    region_history,
    session_history,
    sparse_macs,
)
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.biformer import region_macs
from recsys.efficiency.attention.dhsa import DHSA
from recsys.efficiency.attention.token_select import TokenSelectAttention
from recsys.efficiency.attention.token_sparse import TokenSparseAttention
from recsys.efficiency.cost import Cost


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dominant", [4, 16])
def test_fasa_formula_is_the_count(dominant):
    data = frequent(1024, heads=2)
    dense, ours = fasa_counted(fasa(data, dominant, keep=64), data)
    assert dense == 2 * 2 * 1024 * 128
    assert ours == 2 * fasa_macs(1024, 128, dominant, 64)


def test_fasa_cannot_save_more_than_the_share_of_columns():
    for length in (2**15, 2**17, 2**24):
        assert 2 * length * 128 / fasa_macs(length, 128, 16, 256) < 8


def test_token_select_formula_is_the_count():
    config = TokenSelectAttention.Config(min_length=0, keep=64, initial=16, local=32, chunk=32)
    data = topical(sessions(1024, 16, 112), 2, 64, topics=8)
    dense, ours = select_counted(config, data)
    assert dense == 2 * 2 * 32 * 1024 * 64
    assert ours == 2 * select_macs(1024, 64, config)


@pytest.mark.parametrize("length", [1024, 4096])
def test_token_sparse_formula_is_the_count(length):
    module = TokenSparseAttention(TokenSparseAttention.Config(min_length=0, window=32, min_tokens=64))
    data, positions = skewed(length, HEADS, WIDTH, 4.0), torch.arange(length)
    kept = module.choose(data.q, data.k, positions, None).index.shape[-1]
    with Cost() as cost:
        module(data.q, data.k, data.v, query_positions=positions)
    assert kept < length
    assert cost.macs == HEADS * sparse_macs(length, kept, 32, WIDTH)
    with Cost() as cost:
        dense_attend(data.q, data.k, data.v, query_positions=positions)
    assert cost.macs == HEADS * dense_macs(length, WIDTH)


def test_more_concentrated_attention_keeps_less_at_little_loss():
    module = TokenSparseAttention(TokenSparseAttention.Config(min_length=0, min_tokens=64))
    flat, skew = (dropped(4096, deviation, module) for deviation in (2.0, 4.0))
    assert skew.kept < flat.kept
    assert skew.saved > flat.saved
    assert max(flat.loss.worse, skew.loss.worse) < 0.01


def test_biformer_formula_is_the_count():
    length, width = 4096, WIDTH
    expected = 2 * length**2 * width / region_macs(length, 64, 8, width)
    assert counted(biformer(length), region_history(length, 1), causal=False) == pytest.approx(expected)


def test_ratios_do_not_depend_on_the_heads():
    assert counted(biformer(2048), region_history(2048, 1)) == counted(biformer(2048), region_history(2048, 2))
    module, ratios = DHSA(DHSA.Config(min_length=0, budget=512, query_block=64, n_local=32, n_global=32)), []
    for heads in (1, 2):
        data = session_history(2048, heads)
        ratios.append(counted(module, data, boundaries=data.begins))
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01)


def test_eager_peak_is_executed_and_holds_two_arrays():
    data = session_history(256, 2)
    held = PeakBytes()
    with held:
        held.hold(data.q, data.k, data.v)
        result = eager_attention(data.q, data.k, data.v)
    assert held.peak == eager_peak(2, 256, WIDTH)
    assert held.peak >= 4 * (2 * 2 * 256**2 + 3 * 2 * 256 * WIDTH)
    torch.testing.assert_close(result, dense_attend(data.q, data.k, data.v, query_positions=torch.arange(256)))


def test_peak_forgets_what_is_gone_and_views():
    held = PeakBytes()
    with held:
        for _ in range(3):
            x = torch.zeros(1000)
            x.view(10, 100)[1:] + 1
            del x
    assert held.peak == 4 * 1900


def test_dhsa_peak_is_the_same_again_and_below_eager():
    module = DHSA(DHSA.Config(min_length=0, budget=512, query_block=64, n_local=32, n_global=32))
    data = session_history(2048, 2)
    first, again = peaks(module, data), peaks(module, data)
    assert first == again
    assert first[0] < first[1] < eager_peak(2, 2048, WIDTH)


def test_loss_of_everything_and_of_half():
    data = topical(sessions(64, 4, 8), 2, 16, topics=4)
    attention = weights(data.q, data.k)
    whole = loss(attention, torch.ones(64, dtype=torch.bool), data.v)
    assert whole.worse < 1e-5
    read = torch.arange(64) % 2 == 0
    assert loss(attention, read, data.v).mass == pytest.approx(float(attention[..., 1::2].sum(-1).mean()), abs=1e-5)


def test_choice_loss_is_that_of_the_module():
    data = session_history(1024, 2)
    dense = DHSA(DHSA.Config(min_length=0, budget=2048))
    assert choice_loss(dense, data, data.begins).worse < 1e-4
    module = DHSA(DHSA.Config(min_length=0, budget=256, query_block=64, n_local=32, n_global=32))
    at, positions = torch.arange(0, 1024, 61), torch.arange(1024)
    ours = module(data.q, data.k, data.v, query_positions=positions, boundaries=data.begins)[:, :, at]
    whole = dense_attend(data.q, data.k, data.v, query_positions=positions)[:, :, at]
    assert choice_loss(module, data, data.begins).error == pytest.approx(float((ours - whole).norm() / whole.norm()), rel=1e-3)


def test_rotation_keeps_products_of_equal_distance():
    q, k = torch.randn(2, 1, 16, dtype=torch.float64)
    near, far = ((rotated(q, first=a) * rotated(k, first=b)).sum() for a, b in ((5, 2), (105, 102)))
    torch.testing.assert_close(near, far)


def test_measure_gives_every_check(monkeypatch):
    """The quick run at smaller sizes and without the clock."""
    wall = Ratio(1.0, 1.0, 1.0, 5)
    for module in (attention_decoding, attention_prefill):
        monkeypatch.setattr(module, "beside", lambda dense, ours, pairs: wall)
    monkeypatch.setattr(attention_decoding, "frequent", lambda: frequent(4096, 2))
    monkeypatch.setattr(attention_decoding, "SELECT_LENGTH", 8192)
    monkeypatch.setattr(attention_prefill, "LONG", 8192)
    monkeypatch.setattr(attention_prefill, "LENGTH", 4096)
    rows, checks = attention.measure(quick=True)
    assert {check.name: (check.at_least, check.at_most) for check in checks} == {
        "fasa_32k": (8.0, None),
        "token_select_64k": (5.0, None),
        "token_sparse_128k": (3.3, None),
        "dhsa_prefill_16k": (1.25, None),
        "dhsa_memory": (None, 0.65),
        "biformer_16k": (4.0, None),
    }
    assert all(math.isfinite(check.value) and check.note for check in checks)
    assert {row.module for row in rows} == {"FASA", "TokenSelect", "Token Sparse Attention", "DHSA", "BiFormer"}
