# SPDX-License-Identifier: Apache-2.0
"""A model over codes is put on a catalogue that it has never seen."""

import json
from pathlib import Path

import pytest
import torch

from recsys.core.errors import BundleError, ConfigError, DataError
from recsys.retrieval.codes import code_items
from recsys.retrieval.items import ItemTable, joined
from recsys.retrieval.models import TIGER, RecGPT
from recsys.retrieval.pretrained import from_pretrained, save_pretrained
from recsys.retrieval.tokenizers import CodeTokenizer, ResidualKMeans, SlicedFSQ
from tests.recsys.retrieval.coded import batch_of


def items_of(count: int, seed: int) -> ItemTable:
    return ItemTable(count, torch.ones(count, dtype=torch.bool), torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)))


def trained(repair: str = "keep") -> tuple[RecGPT | TIGER, CodeTokenizer, ItemTable]:
    torch.manual_seed(0)
    items = joined([items_of(20, 0), items_of(30, 1)])
    tokenizer: CodeTokenizer
    if repair == "suffix":
        tokenizer = ResidualKMeans(ResidualKMeans.Config(levels=2, codes=4)).fit(items)
        table = code_items(tokenizer, items, "suffix", 16)
        coded = ItemTable(50, items.warm, items.text, codes=table)
        return TIGER(TIGER.Config(dim=8, layers=1, heads=2, head_dim=4, ffn=16), coded), tokenizer, coded
    tokenizer = SlicedFSQ(SlicedFSQ.Config(slots=2, levels=(5, 5), heads=2, layers=1, epochs=2)).fit(items)
    coded = ItemTable(50, items.warm, items.text, codes=code_items(tokenizer, items))
    return RecGPT(RecGPT.Config(dim=8, blocks=1, heads=2, max_length=5, init_std=0.5), coded), tokenizer, coded


def test_it_says_of_another_catalogue_what_the_trained_model_says(tmp_path: Path) -> None:
    model, tokenizer, _ = trained()
    save_pretrained(model, tokenizer, "minilm", tmp_path / "model", {"domains": ["a", "b"]})
    other = items_of(17, 9)
    loaded, same, coded = from_pretrained(tmp_path / "model", other, "minilm")
    assert coded.codes is not None and same.fingerprint == tokenizer.fingerprint and not loaded.training
    assert torch.equal(coded.codes.codes, tokenizer.encode(other)) and len(loaded.table) == 17
    model.replace_items(coded)
    batch = batch_of([[16, 3], [], [5]])
    one, two = model.eval().encode(batch), loaded.encode(batch)
    assert torch.equal(one.values, two.values) and one.values.std() > 0  # type: ignore[union-attr]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["notes"] == {"domains": ["a", "b"]}


def test_what_was_done_with_collisions_is_done_again(tmp_path: Path) -> None:
    model, tokenizer, _ = trained("suffix")
    save_pretrained(model, tokenizer, "minilm", tmp_path / "model")
    loaded, _, coded = from_pretrained(tmp_path / "model", items_of(40, 9), "minilm")
    assert coded.codes is not None and coded.codes.repair == "suffix" and coded.codes.level_sizes == (4, 4, 16)
    assert len(coded.codes.codes.unique(dim=0)) == 40
    assert loaded.loss(batch_of([[39, 3]], [(0, 1, 2)]))[0].isfinite()


def test_a_directory_that_was_changed_is_refused(tmp_path: Path) -> None:
    model, tokenizer, _ = trained()
    other = SlicedFSQ(SlicedFSQ.Config(slots=2, levels=(5, 5), heads=2, layers=1, epochs=1)).fit(items_of(9, 3))
    with pytest.raises(ConfigError, match=r"tokenizer: expected .* which made the model's codes"):
        save_pretrained(model, other, "minilm", tmp_path / "wrong")
    with pytest.raises(BundleError, match="cannot read the model"):
        from_pretrained(tmp_path / "nowhere", items_of(3, 0), "minilm")
    save_pretrained(model, tokenizer, "minilm", tmp_path / "model")
    with pytest.raises(DataError, match=r"items\.text: expected embeddings by minilm, which the model was trained on, got some by other"):
        from_pretrained(tmp_path / "model", items_of(3, 0), "other")
    with pytest.raises(DataError, match="expected features of width 8, got 7"):
        from_pretrained(tmp_path / "model", ItemTable(2, torch.ones(2, dtype=torch.bool), torch.randn(2, 7)), "minilm")
    config = tmp_path / "model" / "config.json"
    whole = json.loads(config.read_text())
    for key, value, message in (
        ("format", 2, "format: expected 1, got 2"),
        ("tokenizer", "0", "the tokenizer is"),
        ("model", whole["model"] | {"dim": 16}, "the weights do not fit the configuration"),
    ):
        config.write_text(json.dumps(whole | {key: value}))
        with pytest.raises(BundleError, match=message):
            from_pretrained(tmp_path / "model", items_of(3, 0), "minilm")


def test_catalogues_are_joined_by_their_texts() -> None:
    one, two = items_of(3, 0), items_of(2, 1)
    both = joined([one, two])
    assert both.count == 5 and both.text is not None and torch.equal(both.text, torch.cat((one.text, two.text)))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"got widths \[8, None\]"):
        joined([one, ItemTable(2, two.warm)])


def test_codes_are_joined_as_each_catalogue_has_them() -> None:
    one, two = items_of(20, 0), items_of(20, 0)
    tokenizer = ResidualKMeans(ResidualKMeans.Config(levels=2, codes=4)).fit(one)
    coded = [ItemTable(20, t.warm, t.text, codes=code_items(tokenizer, t, "suffix", 16)) for t in (one, two)]
    both = joined(coded)
    assert both.codes is not None and both.codes.repair == "suffix"
    assert torch.equal(both.codes.codes[:20], both.codes.codes[20:])
    assert joined([coded[0], two]).codes is None
    with pytest.raises(DataError, match="codes: expected those of one tokenizer"):
        joined([coded[0], ItemTable(20, two.warm, two.text, codes=code_items(tokenizer, two, "suffix", 17))])
