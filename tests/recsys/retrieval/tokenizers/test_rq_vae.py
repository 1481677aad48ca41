# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from vector_quantize_pytorch import ResidualVQ

from recsys.core.errors import ConfigError, DataError
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import RQVAE, health

LEVELS, CODES, DIM, WIDTH = 3, 16, 8, 20


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(count: int = 1500, clusters: int = 40) -> Tensor:
    which = torch.randint(clusters, (count,), generator=torch.Generator().manual_seed(1))
    return normal(clusters, WIDTH)[which] + 0.3 * normal(count, WIDTH, seed=2)


def table(text: Tensor) -> ItemTable:
    return ItemTable(len(text), torch.ones(len(text), dtype=torch.bool), text)


def new(**options: object) -> RQVAE:
    small = {"levels": LEVELS, "codes": CODES, "hidden": (32, 16), "dim": DIM, "epochs": 30, "batch_size": 256, "learning_rate": 5e-3}
    return RQVAE(RQVAE.Config.model_validate({**small, **options}))


@cache
def fitted() -> RQVAE:
    return new().fit(table(clustered()))


def built() -> RQVAE:
    """Not fitted, with random codebooks."""
    torch.manual_seed(0)
    tokenizer = new(beta=0.3)
    tokenizer._build(WIDTH)
    tokenizer.codebooks.data.copy_(normal(LEVELS, CODES, DIM, seed=3) * torch.tensor([0.3, 0.2, 0.1])[:, None, None])
    return tokenizer


def test_the_encoder_is_the_papers_and_the_decoder_its_mirror() -> None:
    tokenizer = RQVAE(RQVAE.Config())
    tokenizer._build(768)
    assert [tuple(p.shape) for p in tokenizer.encoder.parameters() if p.ndim == 2] == [(512, 768), (256, 512), (128, 256), (32, 128)]
    assert [tuple(p.shape) for p in tokenizer.decoder.parameters() if p.ndim == 2] == [(128, 32), (256, 128), (512, 256), (768, 512)]
    assert tokenizer.level_sizes == (256,) * 3


def test_codes_are_those_of_vector_quantize_pytorch() -> None:
    tokenizer = built()
    peer = ResidualVQ(dim=DIM, num_quantizers=LEVELS, codebook_size=CODES).eval()
    for layer, codebook in zip(peer.layers, tokenizer.codebooks, strict=True):
        layer._codebook.embed.copy_(codebook.detach()[None])
    z = normal(2000, DIM, seed=4)
    quantised, expected, _ = peer(z[None])
    left, codes = tokenizer.residuals(z)
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close(tokenizer.codewords(codes).sum(1), quantised[0])
    torch.testing.assert_close(left[:, -1], z - quantised[0])


def test_the_loss_is_the_papers() -> None:
    tokenizer, x = built(), normal(50, WIDTH, seed=5)
    value, codes = tokenizer.loss(x)
    codebooks = tokenizer.codebooks.detach().double().numpy()
    wide = built().double()
    z = wide.encoder(x.double()).detach().numpy()
    total = 0.0
    for i in range(len(x)):
        residual, quantised = z[i], np.zeros(DIM)
        for level in range(LEVELS):
            distance = ((residual - codebooks[level]) ** 2).sum(1)
            assert distance.argmin() == codes[i, level]
            word = codebooks[level][distance.argmin()]
            total += 1.3 * ((residual - word) ** 2).sum()
            residual, quantised = residual - word, quantised + word
        decoded = wide.decoder(torch.from_numpy(quantised)).detach().numpy()
        total += ((x[i].numpy() - decoded) ** 2).sum()
    assert value.item() == pytest.approx(total / len(x), rel=1e-5)


def test_gradients_are_where_the_stops_let_them() -> None:
    tokenizer, x = built(), normal(50, WIDTH, seed=5)
    tokenizer.loss(x)[0].backward()
    z = tokenizer.encoder(x).detach().requires_grad_()
    left, codes = tokenizer.residuals(z)
    words = tokenizer.codewords(codes).detach()
    # A codeword moves towards its residuals alone: neither the decoder nor the levels below pull it.
    pull = torch.zeros(LEVELS, CODES, DIM)
    for level in range(LEVELS):
        pull[level].index_add_(0, codes[:, level], 2 * (words[:, level] - left[:, level].detach()) / len(x))
    assert tokenizer.codebooks.grad is not None
    torch.testing.assert_close(tokenizer.codebooks.grad, pull)
    # z feels the decoder as if it were the codewords' sum, and β times each level's residual.
    decoded = words.sum(1).requires_grad_()
    (straight,) = torch.autograd.grad((x - tokenizer.decoder(decoded)).square().sum() / len(x), decoded)
    commitment = 2 * 0.3 * (left[:, :-1].detach() - words).sum(1) / len(x)
    expected = torch.autograd.grad(tokenizer.encoder(x), list(tokenizer.encoder.parameters()), straight + commitment)
    for parameter, gradient in zip(tokenizer.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_all_codes_of_clustered_items_are_used_and_reconstruct_them() -> None:
    text = clustered()
    tokenizer = fitted()
    codes = tokenizer.encode(table(text))
    assert [level.used for level in health(codes, tokenizer.level_sizes).levels] == [1, 1, 1]
    left = text - tokenizer.decode(codes)
    assert left.square().sum() < 0.5 * (text - text.mean(0)).square().sum()


def test_raw_unit_vectors_do_not_collapse() -> None:
    """Vectors about a common direction, as text encoders give them, whose deviations are small and uneven."""
    text = functional.normalize(clustered() * torch.linspace(0.002, 0.05, WIDTH) + normal(WIDTH, seed=6))
    tokenizer = new().fit(table(text))
    for level in health(tokenizer.encode(table(text)), tokenizer.level_sizes).levels:
        assert level.used > 0.9 and level.perplexity > CODES / 2


def test_dead_codewords_become_residuals_of_items() -> None:
    tokenizer, x = built(), normal(80, WIDTH, seed=7)
    before = tokenizer.codebooks.detach().clone()
    unused = torch.zeros(LEVELS, CODES, dtype=torch.bool)
    unused[0, 3] = unused[2, [1, 5]] = True
    left = tokenizer.residuals(tokenizer.encoder(x))[0].detach()
    tokenizer._revive(x, unused, torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.codebooks[~unused], before[~unused])
    for level, code in unused.nonzero().tolist():
        assert torch.isclose(tokenizer.codebooks[level, code], left[:, level], atol=1e-6).all(1).any()


def test_training_revives_codewords() -> None:
    """Codewords that are far from everything, from the start or since an epoch, would stay there."""
    tokenizer = new(epochs=9)
    initialise = tokenizer._initialise
    told: list[float] = []

    def far(x_nd: Tensor, generator: torch.Generator) -> None:
        initialise(x_nd, generator)
        tokenizer.codebooks.data[:, 4:] += 1e3

    def progress(done: int, _epochs: int, figures: Mapping[str, float]) -> None:
        told.append(figures["unused"])
        if done == 4:
            tokenizer.codebooks.data[2, :8] += 1e3

    tokenizer._initialise = far  # type: ignore[method-assign]
    tokenizer.fit(table(clustered()), progress=progress)
    assert told[0] == LEVELS * (CODES - 4) and told[3] <= 4
    assert told[4] >= 8 and told[8] <= 4


def test_codes_are_the_same_in_any_batch() -> None:
    text = clustered(400)
    codes = fitted().encode(table(text))
    assert torch.equal(torch.cat([fitted().encode(table(row[None])) for row in text]), codes)
    assert {p.dtype for p in fitted().parameters()} == {torch.float32}, "encoding in float64 changes no weights"


def test_bad_training_is_an_error() -> None:
    with pytest.raises(ConfigError, match="16 need at least as many warm items, got 15"):
        new().fit(table(clustered(15)))
    with pytest.raises(DataError, match="loss of epoch"):
        new(learning_rate=1e30).fit(table(clustered(200)))
