# SPDX-License-Identifier: Apache-2.0
"""Models on paper: the same counts as of models in memory, and sizes that add up."""

import pytest
import torch

from pipelines.cli import main
from recsys.core.config import load_recipe, parse
from recsys.core.errors import ComponentError
from recsys.scaling.paper import PaperRecipe, build_on_meta, kept_per_row, on_paper

SMALL = {
    "name": "small",
    "model": {
        "name": "tokenmixer_large",
        "tokenizer": {"name": "groups"},
        "dim": 24,
        "blocks": 2,
        "embedding": {"dim": 8},
    },
    "fields": {"groups": 3, "per_group": 2, "rows": 50},
    "cluster": {"ranks": 4, "batch": 64, "peak_tflops": 100.0, "mfu": 0.5},
}


def small(**changes: object) -> PaperRecipe:
    return parse(PaperRecipe, SMALL | changes, source="test")


def test_parameters_are_those_of_the_model_in_memory() -> None:
    from recsys.core import components

    recipe = small()
    model = build_on_meta(recipe)
    assert all(p.is_meta for p in model.parameters())
    cls = components.get("ranker", "tokenmixer_large")
    real = cls(parse(cls.Config, recipe.model, source="test"), recipe.fields.spec())
    assert model.costs() == real.costs()
    assert real.tokenizer.tokens == 3 + 1  # a token for each group of fields, and the global one


def test_what_is_kept_is_what_autograd_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same count on real tensors: distinct storages that are saved and are no parameters.

    The models on paper are for GPUs, where SwiGLU keeps nothing of its hidden width and reads tokens where they lie.
    """
    monkeypatch.setattr("recsys.ranking.per_token.swiglu.reads_where_it_lies", lambda _: True)
    monkeypatch.setattr("kernels.token_swiglu._kept_width", lambda x, gate_up: 0)
    recipe = small()
    from recsys.core import components

    cls = components.get("ranker", "tokenmixer_large")
    real = cls(parse(cls.Config, recipe.model, source="test"), recipe.fields.spec())

    def kept(rows: int) -> int:
        own = {p.untyped_storage().data_ptr() for p in real.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage
            return tensor

        fields = torch.randn(rows, sum(real.widths.values()), requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = real.interact(fields)
        assert logits.requires_grad
        return sum(storage.nbytes() for storage in saved.values()) // 4

    assert kept_per_row(build_on_meta(recipe)) == pytest.approx(kept(9) - kept(8), rel=0.02)


def test_memory_and_time_scale_with_the_cluster() -> None:
    paper, larger = on_paper(small()), on_paper(small(cluster=SMALL["cluster"] | {"ranks": 8}))
    assert larger.rank_bytes == pytest.approx(paper.rank_bytes / 2)
    assert larger.step_seconds == pytest.approx(paper.step_seconds / 2)
    assert paper.step_seconds == pytest.approx(3 * paper.costs.flops * 16 / 50e12)
    assert paper.optimizer == pytest.approx(paper.costs.dense * 8 / 4)


@pytest.mark.parametrize(
    ("name", "billions", "share"),
    [
        ("tokenmixer_large_7b", (7.0, 7.6), 1.0),
        ("tokenmixer_large_7b_moe", (7.0, 7.6), 0.51),
        ("tokenmixer_large_15b", (14.5, 15.5), 1.0),
        ("unimixer_1b", (0.9, 1.1), 1.0),
    ],
)
def test_the_shipped_models_have_the_size_of_their_name(name: str, billions: tuple[float, float], share: float) -> None:
    costs = build_on_meta(load_recipe(PaperRecipe, name)).costs()
    assert billions[0] < costs.dense / 1e9 < billions[1]
    assert costs.active / costs.dense == pytest.approx(share, abs=0.01)


def test_the_command_prints_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "tokenmixer_large_7b", "--paper", "--set", "cluster.ranks=128"]) == 0
    printed = capsys.readouterr().out
    assert "| tokenmixer_large_7b | 7.30 B |" in printed and "128 × 512" in printed


def test_a_model_that_is_none_is_named() -> None:
    with pytest.raises(ComponentError, match="unknown ranker 'tokenmixer'"):
        build_on_meta(small(model={"name": "tokenmixer"}))
