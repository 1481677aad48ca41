# SPDX-License-Identifier: Apache-2.0
"""BiFormer's routing attention: the properties of the specification, and what every sparse attention holds."""

import pytest
import torch
from torch.nn.functional import conv1d, scaled_dot_product_attention

from recsys.core.components import get
from recsys.core.errors import ConfigError
from recsys.efficiency.attend import dense_attend, sparse_attend
from recsys.efficiency.attention import blocks as blocks_module
from recsys.efficiency.attention.biformer import BiFormerAttention, optimal_regions, region_flops, region_macs
from recsys.efficiency.cost import Cost

B, H, G, N, D, SIZE = 2, 4, 2, 42, 8, 5
PLACE = torch.arange(N)


def drawn(seed=0, batch=B, keys=N, queries=None, groups=G):
    torch.manual_seed(seed)
    shapes = (batch, H, keys if queries is None else queries, D), (batch, groups, keys, D), (batch, groups, keys, D)
    return tuple(torch.randn(*s, dtype=torch.float64) for s in shapes)


def attention(**config):
    torch.manual_seed(1)
    small = {"min_length": 0, "region_size": SIZE, "top_k": 3}
    return BiFormerAttention(BiFormerAttention.Config(**{**small, **config})).double()


FORMS = [{}, {"per_key_head": True}, {"first_region": True}, {"soft_routing": True}, {"local_kernel": 3, "local_channels": G * D}]
HARD = FORMS[:3]


def brute_regions(q, k, config, length, causal):
    """The regions that each region of one row reads, without the own one in the causal form: [region][group]."""
    ends = range(0, q.shape[1], SIZE)
    found = []
    for i, p in enumerate(ends):
        query = (q[:, p] if causal else q[:, p : min(p + SIZE, length)].mean(1)).unflatten(0, (k.shape[0], -1)).sum(1)
        regions = [j for j, r in enumerate(ends) if r < length and (not causal or j < i)]
        means = [k[:, SIZE * j : min(SIZE * j + SIZE, length)].mean(1) for j in regions]
        scores = torch.stack([(m * query).sum(-1) for m in means], 1) if means else torch.zeros(k.shape[0], 0)
        scores = scores if config.per_key_head else scores.sum(0, keepdim=True)
        if causal and config.first_region and regions:
            scores[:, 0] = torch.inf
        count = config.top_k - causal
        found.append([sorted(sorted(regions, key=lambda j, row=row: (-row[j], -j))[:count]) for row in scores.tolist()])
    return found


@pytest.mark.parametrize("form", HARD)
@pytest.mark.parametrize("causal", [True, False])
def test_routes_by_brute_force(form, causal):
    q, k, _ = drawn(batch=3)
    layer, lengths = attention(**form), torch.tensor([42, 23, 5])
    routes = layer.route(q, k, PLACE if causal else None, lengths)
    for b, length in enumerate(lengths.tolist()):
        expected = brute_regions(q[b], k[b], layer.config, length, causal)
        for i in range(-(-length // SIZE)):
            found = [routes.index[b, g, i][routes.valid[b, g, i]].tolist() for g in range(routes.index.shape[1])]
            assert found == expected[i]


@pytest.mark.parametrize("form", HARD)
@pytest.mark.parametrize("causal", [True, False])
def test_result_is_exact_attention_to_what_was_chosen(form, causal, monkeypatch):
    q, k, v = drawn(batch=3)
    layer, places = attention(**form), PLACE if causal else None
    for lengths in (None, torch.tensor([42, 23, 0])):
        exact = sparse_attend(q, k, v, layer.choose(q, k, places, lengths), query_positions=places)
        for most in (1 << 22, 1):
            monkeypatch.setattr(blocks_module, "_GATHERED", most)
            found = layer(q, k, v, query_positions=places, lengths=lengths)
            torch.testing.assert_close(found, exact, atol=1e-10, rtol=0)


@pytest.mark.parametrize("config", [{"top_k": 9}, {"top_k": 100}, {"region_size": N, "top_k": 1}, {"region_size": None, "regions": 1}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [42, 19], [0, 1]])
def test_all_regions_or_one_region_is_dense(config, causal, lengths):
    q, k, v = drawn()
    if lengths is not None and "regions" in config:
        return
    lengths, places = None if lengths is None else torch.tensor(lengths), PLACE if causal else None
    for per_key_head in (False, True):
        found = attention(**config, per_key_head=per_key_head)(q, k, v, query_positions=places, lengths=lengths, scale=0.2)
        dense = dense_attend(q, k, v, query_positions=places, lengths=lengths, scale=0.2)
        torch.testing.assert_close(found, dense, atol=1e-10, rtol=0)


def test_number_of_regions():
    q, k, v = drawn()
    for causal in (PLACE, None):
        found = attention(region_size=None, regions=9)(q, k, v, query_positions=causal)
        assert torch.equal(found, attention()(q, k, v, query_positions=causal))
    with pytest.raises(ConfigError, match="regions"):
        attention(region_size=None, regions=9)(q, k, v, lengths=torch.tensor([N, N]))


def test_permuting_tokens_inside_a_region_permutes_results_only():
    q, k, v = drawn(keys=40)
    order = torch.cat([SIZE * i + torch.randperm(SIZE) for i in range(8)])
    layer = attention()
    moved = layer(*(x[:, :, order] for x in (q, k, v)))
    torch.testing.assert_close(moved, layer(q, k, v)[:, :, order], atol=1e-10, rtol=0)


def test_permuting_regions_permutes_results():
    q, k, v = drawn(keys=40)
    order = (SIZE * torch.randperm(8)[:, None] + torch.arange(SIZE)).flatten()
    for form in ({}, {"per_key_head": True}, {"soft_routing": True}):
        layer = attention(**form)
        moved = layer(*(x[:, :, order] for x in (q, k, v)))
        torch.testing.assert_close(moved, layer(q, k, v)[:, :, order], atol=1e-10, rtol=0)


def test_queries_of_a_region_share_their_keys():
    q, k, v = drawn(batch=1, groups=H)
    v = torch.eye(N, dtype=torch.float64).expand(1, H, N, N)  # results are the attention weights
    read = attention()(q, k, v) > 0
    for begin in range(0, N, SIZE):
        block = read[0, :, begin : begin + SIZE]
        assert (block == block[:1, :1]).all() and block[0, 0].sum() in (2 * SIZE + N % SIZE, 3 * SIZE)


def test_exact_number_of_keys_in_order_with_forced_regions():
    q, k, _ = drawn()
    chosen = attention(first_region=True).choose(q, k, PLACE, None)
    for i in range(9):
        keys = chosen.index[0, 0, i][chosen.valid[0, 0, i]].tolist()
        own = range(SIZE * i, min(SIZE * i + SIZE, N))
        assert keys == sorted(set(keys)) and len(keys) == SIZE * min(2, i) + len(own)
        assert set(own) | set(range(SIZE)) <= set(keys)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_behind_a_query_has_a_say(form):
    for seed in range(3):
        q, k, v = drawn(seed)
        layer = attention(**form)
        found = layer(q, k, v, query_positions=PLACE)
        for t in (0, 14, 19, 20, 23, 40):
            others = [x.clone() for x in (q, k, v)]
            for x in others:
                x[:, :, t + 1 :] = 4 * torch.randn(x[:, :, t + 1 :].shape, dtype=x.dtype)
            again = layer(*others, query_positions=PLACE)
            torch.testing.assert_close(again[:, :, : t + 1], found[:, :, : t + 1], atol=1e-10, rtol=0)
            shorter = layer(*(x[:, :, : t + 1] for x in (q, k, v)), query_positions=PLACE[: t + 1])
            torch.testing.assert_close(shorter, found[:, :, : t + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_do_not_depend_on_their_mates(form, causal):
    q, k, v = drawn(batch=4)
    lengths, layer = torch.tensor([42, 28, 16, 0]), attention(**form)
    for x in (q, k, v):
        x[1, :, 28:] = 50.0  # padding has no say
    found = layer(q, k, v, query_positions=PLACE if causal else None, lengths=lengths)
    assert not found[3].any()
    for b, length in enumerate(lengths.tolist()[:3]):
        alone = layer(*(x[b : b + 1, :, :length] for x in (q, k, v)), query_positions=PLACE[:length] if causal else None)
        torch.testing.assert_close(found[b : b + 1, :, :length], alone, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_in_parts_is_read_as_the_whole(form):
    q, k, v = drawn()
    layer = attention(**form)
    whole = layer(q, k, v, query_positions=PLACE)
    for begin, end in ((0, 20), (20, 35), (35, 42), (30, 31)):
        part = layer(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], query_positions=PLACE[begin:end])
        torch.testing.assert_close(part, whole[:, :, begin:end], atol=1e-10, rtol=0)


@pytest.mark.parametrize("places", [[41], [36, 37, 38], [23, 24, 25, 26], [3, 20, 21, 41], [30, 30, 36]])
def test_queries_at_other_places(places):
    q, k, v = drawn(queries=len(places))
    places, lengths = torch.tensor(places), torch.tensor([42, 18])
    full = attention(top_k=9, soft_routing=False)(q, k, v, query_positions=places, lengths=lengths)
    torch.testing.assert_close(full, dense_attend(q, k, v, query_positions=places, lengths=lengths), atol=1e-10, rtol=0)
    short = attention()(q, k, v, query_positions=places, lengths=lengths)
    far, values = k.clone(), v.clone()
    far[1, :, 18:], values[1, :, 18:] = 2.0, -2.0
    torch.testing.assert_close(attention()(q, far, values, query_positions=places, lengths=lengths), short, atol=1e-10, rtol=0)
    late = attention(top_k=1)(q, k, v, query_positions=places)  # the own region alone
    own = (places[:, None] // SIZE == PLACE // SIZE) & (places[:, None] >= PLACE)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=own, enable_gqa=True)
    torch.testing.assert_close(late, expected, atol=1e-10, rtol=0)


def test_queries_without_places_may_be_others_than_the_keys():
    q, k, v = drawn(queries=7)
    layer, lengths = attention(), torch.tensor([42, 18])
    found = layer(q, k, v, lengths=lengths)
    exact = sparse_attend(q[:, :, :5], k, v, layer.choose(q[:, :, :5], k, None, lengths))
    torch.testing.assert_close(found[:, :, :5], exact, atol=1e-10, rtol=0)


def test_hard_routing_passes_no_gradient_and_soft_routing_does():
    q, k, v = drawn(batch=1)
    leaves = [x.requires_grad_() for x in (q, k)]
    assert attention().route(q, k, None, None).weights is None
    for causal in (None, PLACE):
        weights = attention(soft_routing=True).route(q, k, causal, None).weights
        assert all(g.any() for g in torch.autograd.grad(weights.square().sum(), leaves))
    hard = attention()
    chosen = hard.choose(q, k, None, None)
    ours, exact = (
        torch.autograd.grad(out.square().sum(), leaves) for out in (hard(q, k, v), sparse_attend(q, k, v, chosen))
    )  # the gradient of attention to a fixed choice, nothing more
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_soft_routing_multiplies_keys_and_values():
    q, k, v = drawn(batch=1, keys=40, groups=H)
    layer = attention(soft_routing=True)
    for causal in (None, torch.arange(40)):
        routes = layer.route(q, k, causal, None)
        found = layer(q, k, v, query_positions=causal)
        for i in (3, 7):
            index, weights = routes.index[0, 0, i], routes.weights[0, 0, i]
            torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
            scores = torch.stack(
                [q[0, :, 5 * i : 5 * i + 5].mean(1).flatten() @ k[0, :, 5 * j : 5 * j + 5].mean(1).flatten() for j in index]
            )
            if causal is not None:
                scores = torch.stack([q[0, :, 5 * i].flatten() @ k[0, :, 5 * j : 5 * j + 5].mean(1).flatten() for j in index])
            torch.testing.assert_close(weights, (scores / (H * D) ** 0.5).softmax(0))
            places = (index[:, None] * SIZE + torch.arange(SIZE)).flatten()
            factor = weights.repeat_interleave(SIZE)[:, None]
            near, far = k[0, :, places] * factor, v[0, :, places] * factor
            mask = torch.ones(5, len(places), dtype=torch.bool)
            if causal is not None:
                near, far = torch.cat((near, k[0, :, 5 * i : 5 * i + 5]), 1), torch.cat((far, v[0, :, 5 * i : 5 * i + 5]), 1)
                mask = torch.cat((mask, torch.ones(5, 5, dtype=torch.bool).tril()), 1)
            expected = scaled_dot_product_attention(q[0, :, 5 * i : 5 * i + 5], near, far, attn_mask=mask)
            torch.testing.assert_close(found[0, :, 5 * i : 5 * i + 5], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_local_enhancement_is_a_depthwise_convolution_of_the_values(causal):
    q, k, v = drawn()
    layer, places = attention(local_kernel=3, local_channels=G * D), PLACE if causal else None
    added = layer(q, k, v, query_positions=places) - attention()(q, k, v, query_positions=places)
    channels = v.transpose(2, 3).flatten(1, 2)
    expected = conv1d(channels, layer.local.weight, layer.local.bias, padding=2 if causal else 1, groups=G * D)[..., :N]
    expected = expected.view(B, G, D, N).transpose(2, 3).repeat_interleave(H // G, 1)
    torch.testing.assert_close(added, expected, atol=1e-10, rtol=0)
    short = attention(local_kernel=3, local_channels=G * D, min_length=N)
    dense = short(q, k, v, query_positions=places) - dense_attend(q, k, v, query_positions=places)
    torch.testing.assert_close(dense, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", [{}, {"soft_routing": True}, {"local_kernel": 3, "local_channels": G * D}])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(form, causal):
    q, k, v = drawn(batch=2, keys=22)
    leaves, layer = [x.requires_grad_() for x in (q, k, v)], attention(**form)
    for lengths in (None, torch.tensor([22, 13])):
        call = lambda *x, n=lengths: layer(*x, query_positions=PLACE[:22] if causal else None, lengths=n)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("regions", "top_k"), [(8, 2), (16, 4), (32, 32)])
def test_cost_is_the_formula(regions, top_k):
    q, k, v = drawn(batch=1, keys=128, groups=H)
    with Cost() as cost:
        attention(region_size=None, regions=regions, top_k=top_k)(q, k, v)
    assert cost.macs == region_macs(128, regions, top_k, H * D)
    routing = regions**2 * H * D  # the paper counts it twice
    assert region_flops(128, regions, top_k, H * D) == 3 * 128 * (H * D) ** 2 + cost.macs + routing


def test_causal_cost():
    q, k, v = drawn(batch=1, keys=128, groups=H)
    with Cost() as cost:
        attention(region_size=8, top_k=4)(q, k, v, query_positions=torch.arange(128))
    assert cost.macs == H * D * (12 * 16 + 2 * (32 * 33 // 2 + 96 * 32))


@pytest.mark.parametrize(("length", "top_k"), [(1000, 1), (4096, 8), (20000, 4)])
def test_optimal_regions_is_where_the_cost_is_lowest(length, top_k):
    cheapest = min(range(1, length + 1), key=lambda r: region_flops(length, r, top_k, 64))
    assert abs(cheapest - optimal_regions(length, top_k)) < 1
    assert optimal_regions(8 * length, top_k) == pytest.approx(4 * optimal_regions(length, top_k))


def test_configuration():
    assert get("sparse_attention", "biformer") is BiFormerAttention
    for key, wrong in (
        ("regions", {"regions": 4, "region_size": 4}),
        ("top_k", {"top_k": 1, "first_region": True}),
        ("local_channels", {"local_kernel": 3}),
        ("local_kernel", {"local_kernel": 4, "local_channels": 8}),
    ):
        with pytest.raises(ValueError, match=key):
            BiFormerAttention.Config(**wrong)
    q, k, v = drawn()
    with pytest.raises(ConfigError, match="local_channels"):
        attention(local_kernel=3, local_channels=5)(q, k, v)
    with pytest.raises(ConfigError, match="local_kernel"):
        attention(local_kernel=3, local_channels=G * D)(q[:, :, :3], k, v)
    assert attention()(q[:, :, :0], k, v, query_positions=PLACE[:0]).shape == (B, H, 0, D)
    assert torch.equal(attention()(q, k, v), attention()(q, k, v))
