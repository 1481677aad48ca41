# SPDX-License-Identifier: Apache-2.0
"""Token Sparse Attention: the properties of the specification, and what every sparse attention holds."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import avg_pool1d, scaled_dot_product_attention

from recsys.core.components import get
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend
from recsys.efficiency.attention.biformer import BiFormerAttention
from recsys.efficiency.attention.dhsa import DHSA
from recsys.efficiency.attention.token_sparse import (
    TokenSparseAttention,
    compress,
    decompress,
    kept_counts,
    layer_drift,
    sparse_layers,
)

B, H, G, N, D = 2, 4, 2, 48, 8
PLACE = torch.arange(N)


def drawn(seed=0, batch=B, keys=N, groups=G):
    torch.manual_seed(seed)
    shapes = (batch, H, keys, D), (batch, groups, keys, D), (batch, groups, keys, D)
    q, k, v = (torch.randn(*s, dtype=torch.float64) for s in shapes)
    return 2 * q, k, v


def attention(**config):
    small = {"min_length": 0, "window": 4, "kernel": 3, "tau": 0.3, "min_tokens": 2}
    return TokenSparseAttention(TokenSparseAttention.Config(**{**small, **config}))


def brute_choice(q, k, length, config, causal=True, groups=H):
    """The tokens each head of one row keeps: the release's steps for one row without padding."""
    q, k = q[:, :length], k[:, :length].repeat_interleave(H // k.shape[0], 0)
    window = min(config.window, length)
    weights = q[:, length - window :] @ k.transpose(1, 2) / D**0.5
    if causal:
        later = torch.arange(length) > torch.arange(length - window, length)[:, None]
        weights = weights.masked_fill(later, -torch.inf)
    scores = weights.softmax(-1).mean(1)[:, : length - window]
    scores = scores.unflatten(0, (groups, -1)).mean(1)
    if not scores.shape[1]:
        return [list(range(length))] * groups
    scores = avg_pool1d(scores[:, None], config.kernel, 1, config.kernel // 2)[:, 0]
    mean = scores.mean(0)
    running, dropped = 0.0, 0
    for mass in sorted((mean / mean.sum()).tolist()):
        running += mass
        if running >= config.tau:
            break
        dropped += 1
    dropped += dropped > 0
    count = min(length - window, max(config.min_tokens, length - window - dropped))
    order = [sorted(range(length - window), key=lambda j, s=head: (-s[j], -j)) for head in scores.tolist()]
    return [sorted(row[:count]) + list(range(length - window, length)) for row in order]


def sets(kept, b):
    return [index[valid].tolist() for index, valid in zip(kept.index[b, :, 0], kept.valid[b, :, 0], strict=True)]


@pytest.mark.parametrize("per_key_head", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_chooses_what_the_release_chooses_for_each_row_alone(per_key_head, causal):
    q, k, _ = drawn(batch=4)
    layer, lengths = attention(per_key_head=per_key_head), torch.tensor([48, 31, 3, 17])
    kept = layer.choose(q, k, PLACE if causal else None, lengths)
    for b, length in enumerate(lengths.tolist()):
        assert sets(kept, b) == brute_choice(q[b], k[b], length, layer.config, causal, G if per_key_head else H)
    assert 4 < kept.valid[0, 0].sum() < N  # neither everything nor nothing


@pytest.mark.parametrize("config", [{"tau": 0.0}, {"min_tokens": N}, {"window": N}, {"min_length": N}])
def test_keep_all_is_dense_bit_for_bit(config):
    q, k, v = drawn()
    for given in (PLACE, None):
        dense = dense_attend(q, k, v, query_positions=given)
        assert torch.equal(attention(**config)(q, k, v, query_positions=given), dense)


def test_keep_all_with_lengths():
    q, k, v = drawn()
    lengths = torch.tensor([0, 29])
    found = attention(tau=0.0)(q, k, v, query_positions=PLACE, lengths=lengths)
    torch.testing.assert_close(found, dense_attend(q, k, v, query_positions=PLACE, lengths=lengths), atol=1e-10, rtol=0)


def test_decompress_undoes_compress_and_leaves_zeros():
    _, k, _ = drawn()
    index = torch.tensor([[[0, 3, 9], [2, 4, 47]]] * B)
    valid = torch.tensor([[[True, True, False]] * G] * B)
    back = decompress(compress(k, index), index, valid, N)
    kept = torch.zeros(B, G, N, dtype=torch.bool)
    kept[:, 0, [0, 3]] = kept[:, 1, [2, 4]] = True
    assert torch.equal(back[kept], k[kept]) and not back[~kept].any()


@pytest.mark.parametrize("per_key_head", [False, True])
def test_kept_tokens_read_the_kept_ones_before_them_and_others_get_zero(per_key_head):
    q, k, v = drawn()
    layer, lengths = attention(per_key_head=per_key_head), torch.tensor([48, 30])
    kept = layer.choose(q, k, PLACE, lengths).mask(N)[:, :, 0].repeat_interleave(2 if per_key_head else 1, 1)
    found = layer(q, k, v, query_positions=PLACE, lengths=lengths)
    far, values = (x.repeat_interleave(H // G, 1) for x in (k, v))
    mask = kept[:, :, None, :] & (PLACE[:, None] >= PLACE)
    scores = (q @ far.transpose(2, 3) / D**0.5).masked_fill(~mask, -torch.inf)
    restricted = scores.softmax(-1).nan_to_num() @ values
    torch.testing.assert_close(found[kept], restricted[kept], atol=1e-10, rtol=0)
    assert not found[~kept].any() and not kept.all()


def test_without_positions_kept_tokens_read_all_kept_ones():
    q, k, v = drawn()
    layer, lengths = attention(), torch.tensor([48, 30])
    kept = layer.choose(q, k, None, lengths).mask(N)[:, :, 0]
    far, values = (x.repeat_interleave(H // G, 1) for x in (k, v))
    restricted = scaled_dot_product_attention(q, far, values, attn_mask=kept[:, :, None].expand(-1, -1, N, -1))
    found = layer(q, k, v, lengths=lengths)
    torch.testing.assert_close(found[kept], restricted[kept], atol=1e-10, rtol=0)
    assert not found[~kept].any()


def test_dropped_mass_is_below_tau_and_one_token():
    q, k, _ = drawn(seed=3)
    weights = (q[:, :, -4:] @ k.repeat_interleave(2, 1).transpose(2, 3) / D**0.5).masked_fill(PLACE[-4:, None] < PLACE, -torch.inf)
    scores = weights.softmax(-1).mean(2)[:, :, : N - 4]
    for tau in (0.05, 0.3, 0.7):
        kept = attention(tau=tau, kernel=1).choose(q, k, PLACE, None).mask(N)[:, :, 0, : N - 4]
        dropped = (scores * ~kept).sum((1, 2)) / scores.sum((1, 2))
        one = scores.mean(1).max(1).values / scores.mean(1).sum(1)
        assert (dropped < tau + one).all() and (dropped > 0).all()


def test_counts_fall_with_tau():
    q, k, _ = drawn()
    counts = [attention(tau=tau).choose(q, k, PLACE, None).valid[:, 0, 0].sum(-1) for tau in (0.0, 0.01, 0.1, 0.3, 0.6, 0.99)]
    assert all((a >= b).all() for a, b in pairwise(counts)) and (counts[0] == N).all() and (counts[-1] < 10).all()


def test_counts_by_hand():
    scores, prefix = torch.tensor([[0.1, 0.5, 0.2, 0.2, 9.0]]), torch.tensor([[True] * 4 + [False]])
    assert [kept_counts(scores, prefix, tau, 0).item() for tau in (0.0, 0.05, 0.15, 0.35)] == [4, 4, 2, 1]
    assert kept_counts(scores, prefix, 0.35, 3).item() == 3


def test_window_is_kept_without_duplicates_in_order():
    q, k, _ = drawn(batch=3)
    lengths = torch.tensor([48, 20, 2])
    kept = attention(tau=0.9, min_tokens=0).choose(q, k, PLACE, lengths)
    for b, length in enumerate(lengths.tolist()):
        for head in sets(kept, b):
            assert set(range(max(length - 4, 0), length)) <= set(head) and head == sorted(set(head)) and head[-1] < length


@pytest.mark.parametrize("causal", [True, False])
def test_composes_with_other_forms(causal):
    q, k, v = drawn()
    given = PLACE if causal else None
    inner = {"name": "biformer", "min_length": 0, "region_size": 4, "top_k": 2}
    alone = BiFormerAttention(BiFormerAttention.Config(**inner))
    layer = attention(tau=0.0)
    layer.inner = alone
    assert torch.equal(layer(q, k, v, query_positions=given), alone(q, k, v, query_positions=given))
    layer = attention()
    lengths = torch.tensor([48, 30])
    plain = layer(q, k, v, query_positions=given, lengths=lengths)
    for full in (
        BiFormerAttention(BiFormerAttention.Config(min_length=0, region_size=4, top_k=N)),
        DHSA(DHSA.Config(min_length=0, budget=64, query_block=4, n_local=0, n_global=0)),
    ):
        layer.inner = full
        torch.testing.assert_close(layer(q, k, v, query_positions=given, lengths=lengths), plain, atol=1e-10, rtol=0)


def test_rows_do_not_depend_on_their_mates():
    q, k, v = drawn(batch=3)
    lengths = torch.tensor([48, 31, 0])
    layer = attention()
    found = layer(q, k, v, query_positions=PLACE, lengths=lengths)
    assert torch.equal(found[[2, 0, 1]], layer(q[[2, 0, 1]], k[[2, 0, 1]], v[[2, 0, 1]], query_positions=PLACE, lengths=lengths[[2, 0, 1]]))
    alone = layer(q[1:2, :, :31], k[1:2, :, :31], v[1:2, :, :31], query_positions=PLACE[:31])
    torch.testing.assert_close(found[1:2, :, :31], alone, atol=1e-10, rtol=0)
    assert not found[2].any() and not found[1, :, 31:].any()


def test_padding_changes_nothing():
    q, k, v = drawn()
    lengths, layer = torch.tensor([31, 40]), attention()
    found = layer(q, k, v, query_positions=PLACE, lengths=lengths)
    for x in (q, k, v):
        x[0, :, 31:] = 100.0
    assert torch.equal(layer(q, k, v, query_positions=PLACE, lengths=lengths)[0, :, :31], found[0, :, :31])


def test_no_future_leak_through_keys_and_values_given_the_choice():
    q, k, v = drawn()
    layer = attention()
    kept = layer.choose(q, k, PLACE, None)
    found = layer.attend_kept(q, k, v, kept, causal=True)
    for t in (10, 30, 45):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, t + 1 :] += 5.0
        torch.testing.assert_close(layer.attend_kept(*others, kept, causal=True)[:, :, : t + 1], found[:, :, : t + 1], atol=1e-12, rtol=0)
    later = v.clone()
    later[:, :, -1] += 5.0  # values never choose
    torch.testing.assert_close(layer(q, k, later, query_positions=PLACE)[:, :, :-1], found[:, :, :-1], atol=1e-12, rtol=0)


def test_other_calls_are_dense():
    q, k, v = drawn()
    layer = attention()
    for places in (PLACE[-3:], PLACE[:0]):
        near = q[:, :, : len(places)]
        assert torch.equal(layer(near, k, v, query_positions=places), dense_attend(near, k, v, query_positions=places))
    assert torch.equal(layer(q[:, :, :5], k, v), dense_attend(q[:, :, :5], k, v))


def test_gradients_flow_through_kept_tokens_only():
    q, k, v = drawn(batch=1, keys=12, groups=2)
    layer = attention(window=2)
    kept = layer.choose(q, k, PLACE[:12], None).mask(12)[:, :, 0]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    layer(*leaves, query_positions=PLACE[:12]).square().sum().backward()
    assert not q.grad[~kept].any() and q.grad[kept].any()
    fixed = layer.choose(q, k, PLACE[:12], None)
    assert torch.autograd.gradcheck(lambda *x: layer.attend_kept(*x, fixed, causal=True), leaves, fast_mode=True)


def test_scale_reaches_the_choice_and_the_attention():
    q, k, v = drawn()
    layer = attention()
    torch.testing.assert_close(
        layer(q, k, v, query_positions=PLACE, scale=0.05),
        layer(q * 0.05 * D**0.5, k, v, query_positions=PLACE),
        atol=1e-10,
        rtol=0,
    )


def test_layers_that_move_little_are_sparse():
    torch.manual_seed(0)
    before = torch.randn(3, 5, 4)
    states = [before]
    for factor in (1.5, 1.1, 3.0, 1.2):
        states.append(states[-1] * factor)
    drift = layer_drift(states)
    torch.testing.assert_close(drift, torch.tensor([0.5, 0.1, 2.0, 0.2]))
    assert sparse_layers(drift) == [1, 3] and sparse_layers(drift, 1.0) == [0, 1, 2, 3] and sparse_layers(drift, 0.0) == [1]
    held = torch.zeros(3, 5, dtype=torch.bool)
    held[0, :2] = True
    states[1][~held] = 1e6
    torch.testing.assert_close(layer_drift(states[:2], held), torch.tensor([0.5]))
    with pytest.raises(ConfigError, match="delta"):
        sparse_layers(drift, 1.5)
    with pytest.raises(ConfigError, match="states"):
        layer_drift(states[:1])


def test_configuration():
    assert get("sparse_attention", "token_sparse") is TokenSparseAttention
    for wrong in ({"kernel": 4}, {"tau": 1.0}, {"window": 0}, {"inner": {"name": "nothing"}}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TokenSparseAttention.Config(**wrong)
    nested = attention(inner={"name": "token_sparse", "min_length": 0, "window": 2, "min_tokens": 0})
    assert isinstance(nested.inner, TokenSparseAttention)
    q, k, v = drawn()
    assert torch.equal(nested(q, k, v, query_positions=PLACE), nested(q, k, v, query_positions=PLACE))
