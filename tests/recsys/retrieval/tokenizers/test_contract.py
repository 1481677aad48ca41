# SPDX-License-Identifier: Apache-2.0
"""What holds for every registered item tokenizer."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recsys.core import components
from recsys.core.config import Config, parse
from recsys.core.errors import BundleError, CannotScoreNewItems, ConfigError, DataError
from recsys.core.files import read_json, write_json
from recsys.retrieval.items import ItemTable
from recsys.retrieval.tokenizers import CodeTokenizer

WIDTH, COUNT = 24, 340
NAMES = components.names("item_tokenizer")
SMALL: dict[str, dict[str, Any]] = {
    "atomic": {},
    "axes_fsq": {"slots": 4, "levels": (5, 4, 3)},
    "fsq": {"slots": 3, "levels": (5, 4, 3), "heads": 2, "layers": 1, "epochs": 2, "batch_size": 64},
    "opq": {"slots": 3, "dim": 12, "iterations": 1},
    "residual_kmeans": {"levels": 3, "codes": 8, "iterations": 4},
    "rq_vae": {"levels": 3, "codes": 8, "hidden": (16, 12), "dim": 6, "epochs": 3, "batch_size": 64},
}
OTHER: dict[str, dict[str, Any]] = {  # one option apart
    "axes_fsq": {"scale": 1.5},
    "fsq": {"form": "sigmoid"},
    "opq": {"iterations": 2},
    "residual_kmeans": {"normalize": True},
    "rq_vae": {"beta": 0.5},
}
DRAWS_NOTHING = ("axes_fsq",)
READS_TEXT = [name for name in NAMES if name != "atomic"]


def table(seed: int = 0, count: int = COUNT) -> ItemTable:
    """Clustered features of uneven deviations; five of six items are warm."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, WIDTH, generator=generator)
    text = centres[torch.randint(12, (count,), generator=generator)] + 0.5 * torch.randn(count, WIDTH, generator=generator)
    return ItemTable(count, warm=torch.arange(count) % 6 != 5, text=text * torch.linspace(0.05, 0.4, WIDTH) + 0.1)


def rows(items: ItemTable, chosen: Tensor) -> ItemTable:
    assert items.text is not None
    return ItemTable(len(chosen), items.warm[chosen], items.text[chosen])


def with_text(items: ItemTable, text: Tensor | None) -> ItemTable:
    return dataclasses.replace(items, text=text)


def new(name: str, **options: Any) -> CodeTokenizer:
    cls = components.get("item_tokenizer", name)
    return cls(cls.Config(**{**SMALL[name], **options}))


@cache
def fitted(name: str) -> CodeTokenizer:
    return new(name).fit(table(), seed=1)


@cache
def codes_of(name: str) -> Tensor:
    return fitted(name).encode(table())


def stored(name: str, root: Path) -> Path:
    fitted(name).save(root / name)
    return root / name


def test_every_tokenizer_has_a_small_configuration_here() -> None:
    assert set(SMALL) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_codes_have_their_shape_and_are_of_their_levels(name: str) -> None:
    codes, sizes = codes_of(name), fitted(name).level_sizes
    assert codes.shape == (COUNT, len(sizes)) and codes.dtype == torch.int64
    assert bool((codes >= 0).all()) and bool((codes < torch.tensor(sizes)).all())
    assert len(codes.unique(dim=0)) > 10


@pytest.mark.parametrize("name", NAMES)
def test_no_items_have_no_codes(name: str) -> None:
    tokenizer = fitted(name)
    empty = tokenizer.encode(rows(table(), torch.arange(0)))
    assert empty.shape == (0, len(tokenizer.level_sizes)) and empty.dtype == torch.int64
    assert tokenizer.decode(empty).shape == (0, tokenizer.width)


@pytest.mark.parametrize("name", NAMES)
def test_decoded_features_have_the_width_and_stand_for_the_items(name: str) -> None:
    items, tokenizer = table(), fitted(name)
    decoded = tokenizer.decode(codes_of(name))
    features = tokenizer.features(items).float()
    assert decoded.shape == (COUNT, tokenizer.width) == features.shape
    assert decoded.dtype == torch.float32 and bool(decoded.isfinite().all())
    if tokenizer.config.name not in ("fsq", "rq_vae"):  # which hardly learn in so few epochs; see their own tests
        assert (decoded - features).square().sum() < 0.6 * (features - features.mean(0)).square().sum()


@pytest.mark.parametrize("name", NAMES)
def test_a_code_of_no_level_is_named(name: str) -> None:
    tokenizer = fitted(name)
    for level, size in enumerate(tokenizer.level_sizes):
        for wrong in (-1, size):
            codes = codes_of(name)[:4].clone()
            codes[2, level] = wrong
            with pytest.raises(DataError, match=rf"level {level} .*, got {wrong}$"):
                tokenizer.decode(codes)
    for malformed in (codes_of(name)[:, :0], codes_of(name)[0], codes_of(name).int()):
        with pytest.raises(DataError, match=r"expected int64 \[N, "):
            tokenizer.decode(malformed)


@pytest.mark.parametrize("name", NAMES)
def test_all_codes_of_a_level_are_ranked_for_an_item(name: str) -> None:
    tokenizer, codes = fitted(name), codes_of(name)
    features = tokenizer.features(table())
    for level, size in enumerate(tokenizer.level_sizes):
        assert tokenizer.nearest_codes(features[:0], codes[0], level).shape == (0, size)
        for row in (0, 5, 77):
            ranked, other = tokenizer.nearest_codes(features[[row, 9]], codes[row], level)
            assert torch.equal(other, tokenizer.nearest_codes(features[[9]], codes[row], level)[0])
            assert torch.equal(ranked.sort().values, torch.arange(size))
            if name in ("atomic", "fsq") or (name == "residual_kmeans" and level == 2):
                assert ranked[0] == codes[row, level], "where its measure is the one that codes are chosen by, the own one comes first"


# --- identity


@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    tokenizer = fitted(name)
    loaded = type(tokenizer).load(stored(name, tmp_path))
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.config == tokenizer.config and loaded.width == tokenizer.width
    assert loaded.level_sizes == tokenizer.level_sizes
    assert torch.equal(loaded.encode(table()), codes_of(name))
    assert torch.equal(loaded.decode(codes_of(name)), tokenizer.decode(codes_of(name)))
    with pytest.raises(FileExistsError):
        loaded.save(tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_learns_the_same_and_leaves_the_random_state_alone(name: str) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = new(name).fit(table(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.fingerprint == fitted(name).fingerprint


@pytest.mark.parametrize("name", READS_TEXT)
def test_another_seed_or_another_configuration_is_another_tokenizer(name: str) -> None:
    variants = [fitted(name), new(name).fit(table(), seed=2), new(name, **OTHER[name]).fit(table(), seed=1)]
    assert len({tokenizer.fingerprint for tokenizer in variants}) == (2 if name in DRAWS_NOTHING else 3)


def test_atomic_is_known_by_its_number_of_items_alone() -> None:
    assert new("atomic").fit(table(3), seed=5).fingerprint == fitted("atomic").fingerprint
    assert new("atomic").fit(table(count=COUNT + 1)).fingerprint != fitted("atomic").fingerprint
    assert fitted("atomic").level_sizes == (COUNT,)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_tensor_is_found(name: str, tmp_path: Path) -> None:
    root = stored(name, tmp_path)
    tensors = load_file(root / "tokenizer.safetensors")
    for changed in tensors:
        one = {key: value.clone() for key, value in tensors.items()}
        one[changed].view(-1)[-1] += 1
        save_file(one, root / "tokenizer.safetensors")
        with pytest.raises(BundleError, match="fingerprint"):
            type(fitted(name)).load(root)


@pytest.mark.parametrize("name", READS_TEXT)
def test_a_changed_configuration_is_found(name: str, tmp_path: Path) -> None:
    root = stored(name, tmp_path)
    content = read_json(root / "tokenizer.json")
    content["config"].update(OTHER[name])
    write_json(root / "tokenizer.json", content)
    with pytest.raises(BundleError, match="fingerprint"):
        type(fitted(name)).load(root)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.safetensors"])
def test_an_absent_or_broken_file_is_an_error(name: str, file: str, tmp_path: Path) -> None:
    root = stored(name, tmp_path)
    for content in (b"", b"[1, 2", b"[]", (root / file).read_bytes()[:-3]):
        (root / file).write_bytes(content)
        with pytest.raises(BundleError, match="cannot read"):
            type(fitted(name)).load(root)
    (root / file).unlink()
    with pytest.raises(BundleError, match="cannot read"):
        type(fitted(name)).load(root)


@pytest.mark.parametrize("name", NAMES)
def test_another_kind_or_format_is_an_error(name: str, tmp_path: Path) -> None:
    root = stored(name, tmp_path)
    for other in set(NAMES) - {name}:
        with pytest.raises(BundleError, match="cannot read"):
            components.get("item_tokenizer", other).load(root)
    content = read_json(root / "tokenizer.json")
    for change in ({"format": 99}, {"width": -1}, {"width": "wide"}, {"config": {"name": name, "unheard_of": 1}}):
        write_json(root / "tokenizer.json", {**content, **change})
        with pytest.raises(BundleError):
            type(fitted(name)).load(root)
    for key in content:
        write_json(root / "tokenizer.json", {k: v for k, v in content.items() if k != key})
        with pytest.raises(BundleError, match="cannot read"):
            type(fitted(name)).load(root)


class Recipe(Config):
    """A recipe that configures an item tokenizer."""

    tokenizer: components.component_config("item_tokenizer")  # type: ignore[valid-type]


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_survives_a_recipe(name: str) -> None:
    recipe = parse(Recipe, {"tokenizer": {"name": name, **SMALL[name]}}, source="a test")
    assert recipe.tokenizer == new(name).config
    again = parse(Recipe, json.loads(json.dumps(recipe.model_dump(mode="json"))), source="a test")
    assert again == recipe
    assert type(components.build("item_tokenizer", again.tokenizer)) is type(fitted(name))


# --- fitting


@pytest.mark.parametrize("name", NAMES)
def test_it_must_be_fitted_once(name: str, tmp_path: Path) -> None:
    tokenizer = new(name)
    assert not tokenizer.fitted and fitted(name).fitted
    codes = codes_of(name)
    for use in (
        lambda: tokenizer.encode(table()),
        lambda: tokenizer.decode(codes),
        lambda: tokenizer.fingerprint,
        lambda: tokenizer.save(tmp_path / "none"),
    ):
        with pytest.raises(ConfigError, match=f"{name}.*not fitted"):
            use()
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match=f"{name}.*fitted already"):
        fitted(name).fit(table(1))
    assert torch.equal(fitted(name).encode(table()), codes)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_frozen(name: str) -> None:
    tokenizer = fitted(name)
    assert not tokenizer.training and not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert not tokenizer.decode(codes_of(name)).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_a_warm_item(name: str) -> None:
    with pytest.raises(DataError, match=r"items\.warm"):
        new(name).fit(dataclasses.replace(table(), warm=torch.zeros(COUNT, dtype=torch.bool)))


@pytest.mark.parametrize("name", READS_TEXT)
def test_it_needs_finite_text_of_its_width(name: str) -> None:
    items = table()
    assert items.text is not None
    for tokenizer, use in ((new(name), "fit"), (fitted(name), "encode")):
        with pytest.raises(DataError, match=f"{name}.*text embeddings"):
            getattr(tokenizer, use)(with_text(items, None))
        for value in (float("nan"), float("inf")):
            text = items.text.clone()
            text[41, 3] = value
            with pytest.raises(DataError, match="row 41 is not finite"):
                getattr(tokenizer, use)(with_text(items, text))
    with pytest.raises(DataError, match=f"width {WIDTH}, got {WIDTH - 1}"):
        fitted(name).encode(with_text(items, items.text[:, 1:]))


@pytest.mark.parametrize("name", NAMES)
def test_only_warm_items_are_learnt_from(name: str) -> None:
    items = table()
    assert items.text is not None
    text = torch.where(items.warm[:, None], items.text, 100 * items.text.flip(0) + 3)
    assert new(name).fit(with_text(items, text), seed=1).fingerprint == fitted(name).fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_progress_ends_with_all_done(name: str) -> None:
    told: list[tuple[int, int, dict[str, float]]] = []
    reported = new(name).fit(table(), seed=1, progress=lambda done, of, figures: told.append((done, of, dict(figures))))
    assert [done for done, _, _ in told] == list(range(1, len(told) + 1))
    assert all(of == len(told) for _, of, _ in told)
    assert reported.fingerprint == fitted(name).fingerprint, "reporting changes nothing"


# --- codes of other items


@pytest.mark.parametrize("name", READS_TEXT)
def test_codes_depend_on_the_own_row_alone(name: str) -> None:
    items, codes, tokenizer = table(), codes_of(name), fitted(name)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(3))
    for chosen in (order, order[:37], order[:1], torch.arange(100)):
        assert torch.equal(tokenizer.encode(rows(items, chosen)), codes[chosen])
    cold = dataclasses.replace(items, warm=torch.zeros(COUNT, dtype=torch.bool))
    assert torch.equal(tokenizer.encode(cold), codes), "being warm or not is no part of the code"


@pytest.mark.parametrize("name", READS_TEXT)
def test_items_appended_later_leave_the_others_codes(name: str) -> None:
    first, later = table(), table(8, 23)
    assert first.text is not None and later.text is not None
    longer = ItemTable(COUNT + 23, torch.cat([first.warm, torch.zeros(23, dtype=torch.bool)]), torch.cat([first.text, later.text]))
    codes = fitted(name).encode(longer)
    assert torch.equal(codes[:COUNT], codes_of(name))
    assert torch.equal(codes[COUNT:], fitted(name).encode(later))


@pytest.mark.parametrize("name", READS_TEXT)
def test_many_items_are_encoded_and_decoded_in_parts(name: str) -> None:
    tokenizer, items = fitted(name), table()
    many = torch.arange(4096 + 3) % COUNT
    codes = tokenizer.encode(rows(items, many))
    assert torch.equal(codes, codes_of(name)[many])
    torch.testing.assert_close(tokenizer.decode(codes), tokenizer.decode(codes_of(name))[many])


def test_atomic_knows_its_own_rows_only() -> None:
    tokenizer = fitted("atomic")
    assert codes_of("atomic").flatten().tolist() == list(range(COUNT)), "warm or not"
    assert torch.equal(tokenizer.encode(rows(table(), torch.arange(50))), codes_of("atomic")[:50]), "a prefix of the catalogue"
    with pytest.raises(CannotScoreNewItems, match=rf"row {COUNT}.*0 to {COUNT - 1} only"):
        tokenizer.encode(table(count=COUNT + 5))
    with pytest.raises(CannotScoreNewItems, match=rf"row {COUNT}:"):
        tokenizer.encode(table(count=5000))
    assert new("atomic").fit(with_text(table(), None)).fingerprint == tokenizer.fingerprint, "it reads no text"
