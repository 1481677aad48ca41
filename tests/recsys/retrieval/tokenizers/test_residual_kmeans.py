# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn import functional

from recsys.core.errors import ConfigError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import ResidualKMeans
from recsys.retrieval.tokenizers.codewords import k_means, nearest


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(text: Tensor) -> ItemTable:
    return ItemTable(len(text), torch.ones(len(text), dtype=torch.bool), text)


def fit(text: Tensor, **options: object) -> ResidualKMeans:
    return ResidualKMeans(ResidualKMeans.Config.model_validate(options)).fit(table(text))


def planted(width: int = 16, sizes: tuple[int, ...] = (6, 6), noise: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Sums of one vector of each level, whose scale falls tenfold with each; every combination 25 times; and the combinations."""
    codes = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).repeat(25, 1)
    words = [functional.normalize(normal(size, width, seed=level)) * 10.0**-level for level, size in enumerate(sizes)]
    words = [word - (word.mean(0) if level else 0) for level, word in enumerate(words)]  # so that a cluster's mean is its first vector
    clean = torch.stack([word[code] for word, code in zip(words, codes.T, strict=True)]).sum(0)
    return clean + noise * normal(*clean.shape, seed=9), codes


def share(tokenizer: ResidualKMeans, text: Tensor) -> float:
    left = text - tokenizer.decode(tokenizer.encode(table(text)))
    return float(left.square().sum() / (text - text.mean(0)).square().sum())


def test_the_nearest_codeword_is_brute_forces() -> None:
    rows, words = normal(300, 7).double(), normal(40, 7, seed=1).double()
    assert torch.equal(nearest(rows, words), torch.from_numpy(cdist(rows, words).argmin(1)))
    stacked = nearest(rows.view(3, 100, 7), words.view(2, 20, 7)[:, None])
    assert stacked.shape == (2, 3, 100)
    assert torch.equal(stacked[1, 2], nearest(rows[200:], words[20:]))


def test_of_equal_codewords_the_first_is_taken() -> None:
    words = normal(8, 24)[[0, 1, 2, 0, 1, 2, 3, 3]]
    codes = nearest(normal(5000, 24, seed=1) * 100, words)
    assert codes.unique().tolist() == [0, 1, 2, 6]


def test_codes_are_the_nearest_centroids_of_the_residuals() -> None:
    text = normal(400, 10) * torch.linspace(0.1, 2, 10) + 3
    tokenizer = fit(text, levels=3, codes=12, iterations=5, standardize=True)
    residual = ((text - text.mean(0)) / text.std(0, correction=0)).double()
    for level, codes in enumerate(tokenizer.encode(table(text)).T):
        centroids = tokenizer.centroids[level].double()
        assert torch.equal(codes, torch.from_numpy(cdist(residual, centroids).argmin(1)))
        residual = residual - centroids[codes]


def test_planted_clusters_are_found_level_by_level() -> None:
    text, planted_codes = planted()
    tokenizer = fit(text, levels=2, codes=6, iterations=20)
    codes = tokenizer.encode(table(text))
    for level in range(2):  # what was planted, but for its numbering
        pairs = torch.stack([codes[:, level], planted_codes[:, level]], 1).unique(dim=0)
        assert len(pairs) == 6 and len(pairs[:, 0].unique()) == 6
    assert share(tokenizer, text) < 1e-3


def test_each_level_leaves_less() -> None:
    text = normal(600, 12)
    figures: list[float] = []
    tokenizer = ResidualKMeans(ResidualKMeans.Config(levels=4, codes=16, iterations=8))
    tokenizer.fit(table(text), progress=lambda _done, _of, told: figures.append(told["error"]))
    assert figures == sorted(figures, reverse=True) and figures[0] < 1 and figures[3] < 0.5 * figures[0]
    assert figures[3] == pytest.approx(share(tokenizer, text), rel=1e-4)
    shorter = fit(text, levels=2, codes=16, iterations=8)
    assert torch.equal(shorter.centroids, tokenizer.centroids[:2]), "levels are learnt one after the other"


def test_centroids_are_the_means_of_their_items() -> None:
    text, _ = planted(noise=0.01)
    centroids = k_means(text, 6, 30, torch.Generator().manual_seed(0))
    codes = nearest(text, centroids)
    assert torch.equal(codes.unique(), torch.arange(6))
    torch.testing.assert_close(centroids, torch.stack([text[codes == code].mean(0) for code in range(6)]), atol=1e-5, rtol=1e-5)


def test_residuals_of_unit_length() -> None:
    text = normal(500, 8) * torch.linspace(0.5, 20, 500)[:, None]
    tokenizer = fit(text, levels=3, codes=16, iterations=8, normalize=True)
    codes = tokenizer.encode(table(text))
    residual = text.double()
    for level in range(3):
        residual = functional.normalize(residual)
        assert torch.equal(codes[:, level], nearest(residual, tokenizer.centroids[level]))
        residual = residual - tokenizer.centroids[level][codes[:, level]]
    assert torch.equal(tokenizer.encode(table(text * 7)), codes), "the length of a vector is no part of its codes"
    decoded = tokenizer.decode(codes)
    assert functional.cosine_similarity(decoded, text).mean() > 0.9
    assert 0.8 < decoded.norm(dim=1).mean() / text.norm(dim=1).mean() < 1.1, "the mean length is put back"


def test_as_many_items_as_codes_are_enough_and_fewer_are_not() -> None:
    text = normal(16, 5)
    assert len(fit(text, levels=1, codes=16).encode(table(text)).unique()) == 16
    with pytest.raises(ConfigError, match="17 need at least as many warm items, got 16"):
        fit(text, levels=1, codes=17)


def test_equal_items_and_dimensions_that_do_not_vary() -> None:
    text = torch.cat([normal(5, 6).repeat(20, 1), torch.ones(100, 1)], 1)
    tokenizer = fit(text, levels=2, codes=8, standardize=True)
    assert bool(tokenizer.centroids.isfinite().all())
    assert len(tokenizer.encode(table(text)).unique(dim=0)) == 5
    assert share(tokenizer, text) < 1e-4
