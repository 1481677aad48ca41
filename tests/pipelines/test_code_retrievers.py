# SPDX-License-Identifier: Apache-2.0
"""Whole runs whose retriever speaks in codes: tokenizer, codes and index travel in the bundle, and the server's lists are the run's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipelines.recipe import Recipe
from pipelines.run import execute
from pipelines.steps.retrieving import build_index
from recsys import registry
from recsys.core.config import load_recipe
from recsys.core.errors import BundleError, ConfigError
from recsys.data.batch import SequenceBatch
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.catalogue import BeamIndex, GatherIndex
from recsys.retrieval.codes import extend
from recsys.retrieval.items import ItemTable
from tests.pipelines.small import SMALL

GATE = "gates=[{kind: bound, metric: parity.max_difference, at_most: 0.0001}]"
OWN = {
    "tiger": (
        "codes.tokenizer={name: residual_kmeans, levels: 2, codes: 8}",
        "codes.suffix_size=64",
        "retriever.model={name: tiger, dim: 16, layers: 1, heads: 2, head_dim: 8, ffn: 16, max_length: 5}",
        "retriever.windows.stride=5",
    ),
    "rpg": ("codes.tokenizer={name: residual_kmeans, levels: 3, codes: 8}",),
    "recgpt": ("codes.tokenizer={name: fsq, slots: 4, levels: [5, 5], epochs: 2}",),
}


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("tiger", BeamIndex),
        pytest.param("rpg", GatherIndex, marks=pytest.mark.slow),
        pytest.param("recgpt", GatherIndex, marks=pytest.mark.slow),
    ],
)
def test_a_run_ends_in_a_bundle_that_serves_its_lists(name: str, index: type, tmp_path: Path) -> None:
    run = execute(load_recipe(Recipe, name, (*SMALL, GATE, *OWN[name])), tmp_path, Console(quiet=True))
    assert run.results["champion"]["promoted"] and len(run.results["served"]["known_user"]["items"]) == 10
    bundle = registry.load("models:/recsys@champion", run.location)
    assert isinstance(bundle.retriever, CodeRetriever) and isinstance(bundle.index, index)
    assert bundle.tokenizer is not None and bundle.tokenizer.fingerprint == bundle.retriever.table.tokenizer
    view = bundle.catalogue.snapshot()
    batch = SequenceBatch(torch.tensor([3, 5]), torch.tensor([0, 2, 2]))
    with torch.inference_mode():
        state = bundle.retriever.encode(batch)
        rows, scores = bundle.index.search(state, 10, view)
        rebuilt = build_index(bundle.index.config, bundle.retriever, bundle.catalogue)
        assert (rows == rebuilt.search(state, 10, view)[0]).all() and (scores > -torch.inf).all()
    old = bundle.item_table
    assert old.text is not None and old.codes is not None
    with pytest.raises(BundleError, match=r"the codes are of the tokenizer .*, but the bundle has None"):
        replace(bundle, tokenizer=None).save(tmp_path / "other")
    other = type(bundle.index).build(bundle.index.config, replace(old.codes, codes=old.codes.codes.flip(0)), view)
    with pytest.raises(BundleError, match="the index does not hold the codes of the items"):
        replace(bundle, index=other).save(tmp_path / "other")
    grown = ItemTable(old.count + 1, torch.cat((old.warm, torch.tensor([False]))), torch.cat((old.text, old.text[:1])))
    assert len(extend(old.codes, bundle.tokenizer, grown)) == old.count + 1, "the bundle can give a new item its codes"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codes=null", "codes: the retriever 'tiger' reads codes of items; expected a tokenizer, got none"),
        ("index={name: gather}", "retriever 'tiger' gives EncoderMemory, but index 'gather' accepts SlotLogProbs"),
        ("index.widths=[10, 20, 20]", r"index.widths: expected 4, one for each level of the codes, got \[10, 20, 20\]"),
        ("codes.repair=drop", "codes.repair"),
        ("codes.tokenizer.name=rq_vea", "did you mean 'rq_vae'"),
        ("retriever.model={name: rpg}", "codes.repair: 'rpg' wants levels of one size; expected keep or nearest_free, got 'suffix'"),
        ("retriever.model={name: hstu}", "codes: the retriever 'hstu' does not read codes; expected null"),
        ("collaborative.model={name: hstu}", "collaborative.model: expected sasrec, got 'hstu'"),
        ("retriever.model={name: sasrec}", "retriever.model: 'sasrec' is the collaborative model, beside which"),
    ],
)
def test_parts_that_do_not_fit_are_an_error_before_anything_runs(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(Recipe, "tiger", (*SMALL, override))


@pytest.mark.parametrize(
    ("tokenizer", "repair", "levels"),
    [
        ("{name: residual_kmeans, levels: 3}", "suffix", 4),
        ("{name: residual_kmeans, levels: 3}", "keep", 3),
        ("{name: fsq, slots: 4}", "nearest_free", 4),
        ("{name: atomic}", "keep", 1),
    ],
)
def test_a_beam_has_a_width_for_each_level_of_the_codes(tokenizer: str, repair: str, levels: int) -> None:
    codes = (*SMALL, f"codes.tokenizer={tokenizer}", f"codes.repair={repair}")
    recipe = load_recipe(Recipe, "tiger", (*codes, f"index.widths={[10] * levels}"))
    assert recipe.codes is not None and recipe.codes.levels == levels == len(recipe.index.widths)
    with pytest.raises(ConfigError, match=f"index.widths: expected {levels}, one for each level"):
        load_recipe(Recipe, "tiger", (*codes, f"index.widths={[10] * (levels + 1)}"))
