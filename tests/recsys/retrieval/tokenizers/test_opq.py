# SPDX-License-Identifier: Apache-2.0
from functools import cache

import faiss
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from recsys.core.errors import ConfigError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import OPQ, health

WIDTH, SLOTS, DIM = 20, 4, 12


def table(text: Tensor) -> ItemTable:
    return ItemTable(len(text), torch.ones(len(text), dtype=torch.bool), text)


@cache
def text() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(700, WIDTH, generator=generator) * torch.linspace(3, 0.2, WIDTH)
    return mixed @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] + 0.7


def fit(features: Tensor, **options: object) -> OPQ:
    return OPQ(OPQ.Config.model_validate({"slots": SLOTS, "dim": DIM, "iterations": 2, **options})).fit(table(features))


@cache
def fitted() -> OPQ:
    return fit(text())


def test_the_components_are_whitened() -> None:
    white = fitted().whiten(text())
    torch.testing.assert_close(white.T.cov(), torch.eye(DIM, dtype=torch.float64), atol=1e-5, rtol=0)
    expected = PCA(DIM, whiten=True, svd_solver="full").fit_transform(text().double().numpy())
    np.testing.assert_allclose(np.abs(white.numpy()), np.abs(expected), atol=1e-5)


def test_the_rotation_is_one() -> None:
    rotation = fitted().rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(DIM), atol=1e-5, rtol=0)


def test_codes_are_those_of_faiss() -> None:
    tokenizer = fitted()
    quantiser = faiss.ProductQuantizer(DIM, SLOTS, 8)
    faiss.copy_array_to_vector(tokenizer.centroids.numpy().ravel(), quantiser.centroids)
    rotated = tokenizer.whiten(text()).float() @ tokenizer.rotation.T
    codes = tokenizer.encode(table(text()))
    assert np.array_equal(quantiser.compute_codes(rotated.numpy()), codes.numpy())
    decoded = torch.from_numpy(quantiser.decode(codes.numpy().astype(np.uint8)))
    torch.testing.assert_close(tokenizer.decode(codes), _unwhitened(tokenizer, decoded))


def test_the_authors_index_gives_the_same_codes() -> None:
    """``OPQ,IVF1,PQ`` by inner product, on the same whitened components with the same seed, but for the renumbering of codes."""
    tokenizer = fitted()
    white = tokenizer.whiten(text()).float().numpy()
    index = faiss.index_factory(DIM, f"OPQ{SLOTS},IVF1,PQ{SLOTS}x8", faiss.METRIC_INNER_PRODUCT)
    transform, inverted = faiss.downcast_VectorTransform(index.chain.at(0)), faiss.downcast_index(index.index)
    seeded = faiss.ProductQuantizer(DIM, SLOTS, 8)
    transform.niter, transform.pq, inverted.do_polysemous_training = 2, seeded, False
    for quantiser in (seeded, inverted.pq):
        quantiser.cp.seed = int(torch.randint(1 << 31, (), generator=torch.Generator().manual_seed(0)))
        quantiser.cp.min_points_per_centroid = 1
    index.train(white)
    index.add(white)
    codes = faiss.rev_swig_ptr(inverted.invlists.get_codes(0), len(white) * SLOTS).reshape(len(white), SLOTS)
    assert np.mean(codes == tokenizer.encode(table(text())).numpy()) > 0.99  # IVF1 moves the vectors, and with them the last bits


def _unwhitened(tokenizer: OPQ, rotated: Tensor) -> Tensor:
    return rotated @ tokenizer.rotation * tokenizer.scale @ tokenizer.components + tokenizer.mean


def test_decoding_inverts_rotation_and_components() -> None:
    """What has codewords for features and lies in the components' space comes back as it was."""
    tokenizer = fitted()
    codes = torch.randint(256, (300, SLOTS), generator=torch.Generator().manual_seed(5))
    decoded = tokenizer.decode(codes)
    assert (tokenizer.encode(table(decoded)) == codes).float().mean() > 0.999  # but for codewords that are all but equal
    features = text()
    left = features - tokenizer.decode(tokenizer.encode(table(features)))
    lost = features - _unwhitened(tokenizer, tokenizer.whiten(features).float() @ tokenizer.rotation.T)
    variance = (features - features.mean(0)).square().sum()
    assert lost.square().sum() < left.square().sum() < 0.35 * variance


def test_codes_are_used() -> None:
    report = health(fitted().encode(table(text())), fitted().level_sizes)
    assert fitted().level_sizes == (256,) * SLOTS
    assert min(level.used for level in report.levels) > 0.9


def test_slots_look_at_their_own_part_alone() -> None:
    tokenizer = fitted()
    codes = tokenizer.encode(table(text()))
    for slot in range(SLOTS):
        part = torch.zeros(DIM)
        part[slot * DIM // SLOTS : (slot + 1) * DIM // SLOTS] = 2.0
        moved = text() + part @ tokenizer.rotation * tokenizer.scale @ tokenizer.components
        changed = tokenizer.encode(table(moved)) != codes
        assert changed[:, slot].float().mean() > 0.9
        changed[:, slot] = False
        assert not bool(changed.any())


@pytest.mark.parametrize(("slots", "dim", "expected"), [(4, None, 20), (3, None, 18), (4, 8, 8), (20, None, 20)])
def test_as_many_components_as_fit(slots: int, dim: int | None, expected: int) -> None:
    tokenizer = OPQ(OPQ.Config(slots=slots, dim=dim))
    tokenizer._build(WIDTH)
    assert tokenizer.centroids.shape == (slots, 256, expected // slots)
    wide = OPQ(OPQ.Config())
    wide._build(3072)
    assert wide.components.shape == (512, 3072) and wide.centroids.shape == (32, 256, 16)


@pytest.mark.parametrize(("slots", "dim"), [(4, 10), (4, 24), (32, None)])
def test_a_dim_that_does_not_fit_is_an_error(slots: int, dim: int | None) -> None:
    with pytest.raises(ConfigError, match=f"multiple of {slots} slots within the features' width {WIDTH}"):
        fit(text(), slots=slots, dim=dim)


def test_too_few_items_are_an_error() -> None:
    with pytest.raises(ConfigError, match="needs at least 256 warm items, got 255"):
        fit(text()[:255])
    with pytest.raises(ConfigError, match="needs at least 320 warm items, got 319"):
        fit(torch.randn(319, 400), slots=1, dim=320)


def test_directions_that_do_not_vary_are_left_out() -> None:
    flat = torch.cat([text()[:, :5], text()[:, :5] @ torch.ones(5, 15)], 1)
    tokenizer = fit(flat)
    white = tokenizer.whiten(flat)
    torch.testing.assert_close(white.var(0), torch.tensor([1.0] * 5 + [0.0] * 7, dtype=torch.float64), atol=1e-5, rtol=0)
    codes = tokenizer.encode(table(flat))
    assert (flat - tokenizer.decode(codes)).square().sum() < 0.1 * (flat - flat.mean(0)).square().sum()
    few = fit(torch.randn(260, 270, generator=torch.Generator().manual_seed(0)), slots=1, dim=260, iterations=1)
    assert int(few.components.any(1).sum()) == 259, "as many as rows about their mean"
    assert all(bool(tensor.isfinite().all()) for tensor in few.state_dict().values())
