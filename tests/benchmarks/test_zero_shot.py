# SPDX-License-Identifier: Apache-2.0
"""RecGPT trained on two small catalogues and asked about a third, in which neighbours have similar texts too."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.retrieval_quality import code_ceiling, zero_shot
from benchmarks.retrieval_quality.data import Dataset
from benchmarks.retrieval_quality.plans import Plan
from benchmarks.retrieval_quality.zero_shot import Asked, ZeroShot
from recsys.data.batch import SequenceBatch
from recsys.data.jagged import Jagged
from recsys.data.sequences import SequenceData
from recsys.evaluation.metrics.ranking import ndcg_at

USERS = 80
FSQ = {"name": "fsq", "slots": 4, "levels": [5, 5], "epochs": 5, "heads": 2}
MODEL = {"name": "recgpt", "dim": 16, "blocks": 1, "heads": 2, "max_length": 8, "init_std": 0.3}
CONFIG = {"model": MODEL, "codes": "fsq", "tokenizer": FSQ, "recent": 100}


def domain(name: str, items: int, seed: int, cache: Path) -> Dataset:
    """Users who walk up a catalogue; the texts of neighbours share words."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 8, USERS)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    start = np.repeat(rng.integers(0, items, USERS), lengths)
    rows = (start + np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)) % items
    events = SequenceData.from_order([f"u{i}" for i in range(USERS)], Jagged(rows, offsets))
    return Dataset(name, name, events, tuple(" ".join(f"w{(i + j) % items}" for j in range(3)) for i in range(items)), cache=cache)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ZeroShot:
    monkeypatch.setattr(zero_shot, "ENCODER", "hashing")
    monkeypatch.setattr(zero_shot, "MODEL", {"name": "recgpt", "dim": 16, "blocks": 1, "heads": 2, "max_length": 8})
    monkeypatch.setattr(zero_shot, "TOKENIZER", FSQ)
    monkeypatch.setattr(zero_shot, "AXES", {"name": "axes_fsq", "slots": 4, "levels": [3, 3]})
    monkeypatch.setattr(zero_shot, "TRAINING", zero_shot.training(32, 2, 0.01, 2))
    monkeypatch.setattr(zero_shot, "WINDOWS", {"stride": 8})
    monkeypatch.setattr(zero_shot, "FEW_TRAINING", zero_shot.training(16, 2, 0.01, 2))
    few = zero_shot.PLANS["sasrec"]
    small = {"dim": 16, "blocks": 1, "heads": 1, "max_length": 8}
    monkeypatch.setattr(zero_shot, "PLANS", {"sasrec": Plan(small, few.points, {"stride": 8}, zero_shot.training(16, 2, 0.01, 2))})
    domains = {name: domain(name, 20 + 5 * i, i, tmp_path) for i, name in enumerate("abc")}
    return ZeroShot(domains, tmp_path / "raw.jsonl", tmp_path)


def test_cells_are_filled_once_and_say_how_they_rank_new_targets(runner: ZeroShot, capsys: pytest.CaptureFixture[str]) -> None:
    runner.baselines("a")
    for variant in zero_shot.VARIANTS:
        runner.variant("a", variant, 0)
    records = {record["variant"]: record for record in runner.records()}
    assert set(records) == {*zero_shot.BASELINES, *zero_shot.VARIANTS}
    assert set(records["full"]["test"]) == {"unseen", "any", "no_trie"} and set(records["causal"]["test"]) == {"unseen", "any"}
    assert records["full"]["config"]["sources"] == ["b", "c"]
    test = runner.domains["a"].split.test
    for record in records.values():
        ranks = runner.ranks(record["cell"], "unseen")
        assert len(ranks) == len(test) and record["test"]["unseen"]["all"]["ndcg@10"] == pytest.approx(ndcg_at(ranks, 10).mean())
    assert "a full seed 0: NDCG@10 unseen:" in capsys.readouterr().out
    before = runner.raw.read_text()
    runner.baselines("a")
    runner.variant("a", "full", 0)
    assert runner.raw.read_text() == before


def test_combinations_are_numbered_as_items_are() -> None:
    sizes = (3, 4, 5)
    codes = torch.stack([torch.tensor([0, 2]), torch.tensor([3, 1]), torch.tensor([4, 0])])[None]
    found = zero_shot._numbers(codes, sizes)[0].tolist()
    assert found == [(a * 4 + b) * 5 + c for a, b, c in product([0, 2], [3, 1], [4, 0])]


def test_ranks_are_those_of_the_sums_over_codes(runner: ZeroShot) -> None:
    asked = Asked({name: runner.domains[name] for name in "bc"}, CONFIG, 0, runner.cache)
    target = runner.domains["a"]
    items = asked.coded(target)
    assert items.codes is not None
    ranks = asked.asked(target, unconstrained=True)
    asked.model.replace_items(items)
    steps, codes = target.split.test, items.codes.codes
    every = list(product(range(25), repeat=2))
    for step in range(20):
        seen = target.data.items[steps.start[step] : steps.event[step]]
        state = asked.model.encode(SequenceBatch(torch.from_numpy(seen[-8:].copy()), torch.tensor([0, min(len(seen), 8)])))
        slots = state.values[0].detach()  # type: ignore[union-attr]
        scores = sum(slots[k, codes[:, k]] for k in range(4)).numpy()
        wanted = steps.targets.values[step]
        place = 1 + (scores > scores[wanted]).sum() + ((scores == scores[wanted]).sum() - 1) / 2
        assert ranks["any"][step] == place
        unseen = np.setdiff1d(np.arange(target.count), seen)
        better = (scores[unseen] > scores[wanted]).sum() + ((scores[unseen] == scores[wanted]).sum() - 1) / 2
        assert ranks["unseen"][step] == 1 + better
        pairs = [max(float(slots[2 * half, a] + slots[2 * half + 1, b]) for a, b in every) for half in (0, 1)]
        best = sum(pairs)
        own = float(sum(slots[k, codes[wanted, k]] for k in range(4)))
        assert (ranks["no_trie"][step] == 1) == (abs(own - best) < 1e-5)


def test_what_codes_keep_is_measured_by_neighbours(runner: ZeroShot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours have similar texts and follow each other, so whole texts find all; one axis of them does not."""
    monkeypatch.setattr(code_ceiling, "ENCODER", "hashing")
    monkeypatch.setattr(code_ceiling, "TOKENIZER", FSQ)
    monkeypatch.setattr(code_ceiling, "AXES", {"name": "axes_fsq", "slots": 4, "levels": [3, 3]})
    monkeypatch.setattr(code_ceiling, "DIMENSIONS", (1, 20))
    found = code_ceiling.ceilings(runner.domains, "a", runner.cache)
    assert found["text"] > 0.9
    assert found["1 axes"] < found["20 axes"]
    assert found["axes_fsq, 4 codes, as points"] > 0 and found["fsq, 4 codes, told apart"] > 0


def test_points_of_a_grid_are_the_digits_of_codes() -> None:
    told_apart, grid = code_ceiling.of_codes(torch.tensor([[0, 5], [1, 2]]), (2, 3))
    assert told_apart.shape == (2, 12) and told_apart.sum(1).tolist() == [2, 2]
    assert grid.tolist() == [[-1.0, -1.0, 1.0, 1.0], [1.0, -1.0, -1.0, 0.0]]


def test_principal_axes_are_the_sources() -> None:
    random = torch.Generator().manual_seed(0)
    sources = torch.randn(200, 4, generator=random) * torch.tensor([5.0, 2.0, 1.0, 0.1]) + 3
    found = code_ceiling.principal(sources, sources, 2)
    torch.testing.assert_close(found.std(0), torch.ones(2))
    assert torch.corrcoef(torch.stack((found[:, 0], sources[:, 0])))[0, 1].abs() > 0.99
    assert code_ceiling.levels(torch.tensor([-9.0, -0.2, 0.3, 9.0])).tolist() == [-2.0, 0.0, 1.0, 2.0]
