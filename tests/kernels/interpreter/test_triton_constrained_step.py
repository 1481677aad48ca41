# SPDX-License-Identifier: Apache-2.0
"""One step of beam search in Triton's interpreter: bits of the CPU's, with dead beams, masks, ties, and several tiles and launches."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import backend
from kernels.constrained_step import constrained_step, triton_ops
from recsys.retrieval.catalogue import BeamIndex, Catalogue
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.state import SlotLogProbs


@pytest.fixture(autouse=True)
def unwritten_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *sizes, **options) -> Tensor:
        made = new_empty(self, *sizes, **options)
        return made.fill_(torch.nan if made.is_floating_point() else True if made.dtype == torch.bool else 0x6BADBEEF)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def drawn(users: int, beams: int, codes: int, nodes: int, seed: int = 0) -> list[Tensor]:
    """Halves, nodes without children, beams that are none, and every mask; the first user may take all."""
    random = torch.Generator().manual_seed(seed)
    has_code = torch.rand(nodes, codes, generator=random) < torch.rand(nodes, 1, generator=random) - 0.1
    first = torch.cat((torch.zeros(1, dtype=torch.int64), has_code.sum(1).cumsum(0)))
    code_of = has_code.nonzero()[:, 1]
    log_probs = torch.randint(-8, 1, (users, beams, codes), generator=random) / 2
    log_probs[torch.rand(log_probs.shape, generator=random) < 0.1] = -torch.inf
    places = torch.rand(users, nodes, generator=random).argsort(1)[:, :beams]
    scores = torch.randint(-8, 1, (users, beams), generator=random) / 2
    dead = torch.rand(scores.shape, generator=random) < 0.3
    scores[dead], places[dead] = -torch.inf, 1 << 40
    closing = torch.rand(users, len(code_of), generator=random) < 0.4
    closing[:1] = False
    user, closed = closing.nonzero(as_tuple=True)
    alive = torch.rand(len(code_of), generator=random) < 0.8
    return [log_probs, places, scores, first, code_of, alive, torch.searchsorted(user, torch.arange(users + 1)), closed]


def hold_equal_to_the_cpu(tensors: list[Tensor | None], *rest) -> None:
    expected = constrained_step(*tensors, *rest)
    with backend.use("triton"):
        found = constrained_step(*tensors, *rest)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine.float().numpy(), theirs.float().numpy())


@pytest.mark.parametrize(("users", "beams", "codes", "width", "children"), [(2, 3, 40, 17, None), (2, 3, 20, 9, 3), (2, 2, 5, 3, 9)])
def test_equals_the_cpu(users: int, beams: int, codes: int, width: int, children: int | None) -> None:
    tensors = drawn(users, beams, codes, 8)
    hold_equal_to_the_cpu(tensors, width, children)


def test_masks_may_be_left_out() -> None:
    tensors = drawn(2, 2, 5, 8)
    hold_equal_to_the_cpu([*tensors[:5], None, *tensors[6:]], 4)
    hold_equal_to_the_cpu([*tensors[:6], None, None], 4)


def test_more_beams_than_are_looked_at_at_once() -> None:
    hold_equal_to_the_cpu(drawn(1, 37, 3, 40), 12, 2)


def test_users_in_several_launches_and_shared_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "_MOST_KEYS", 40)
    tensors = drawn(5, 3, 6, 8)
    hold_equal_to_the_cpu([tensors[0][:, :1].expand(-1, 3, -1), *tensors[1:]], 4)


def test_no_users_no_beams_and_no_children() -> None:
    for users, beams in ((0, 3), (2, 0)):
        hold_equal_to_the_cpu(drawn(users, beams, 4, 5), 2)
    hold_equal_to_the_cpu([torch.zeros(1, 1, 4), *one_node([])[1:]], 2)


def one_node(values: list[float]) -> list[Tensor | None]:
    size = len(values)
    start = [torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), torch.tensor([0, size]), torch.arange(size)]
    return [torch.tensor([[values]]), *start, None, None, None]


def test_nan_of_either_sign_and_infinity_come_first() -> None:
    tensors = one_node([-1.0, 0.0, math.inf, -0.0, 0.0, -math.inf, math.nan])
    tensors[0][0, 0, 4] = -torch.tensor(torch.nan)
    hold_equal_to_the_cpu(tensors, 4)
    hold_equal_to_the_cpu(tensors, 8)


@pytest.mark.parametrize("values", [[-math.inf] * 2, [math.nan, -1.0], [math.inf, -1.0], [-1e30, -1.0]])
def test_what_cannot_be_renormalised_stays(values: list[float]) -> None:
    hold_equal_to_the_cpu(one_node(values), 2, None, True)


def test_wider_lists_than_fit_take_another_way() -> None:
    tensors = drawn(1, 2, 4, 5)
    assert not triton_ops.supports(tensors[0], tensors[2], 1025)
    hold_equal_to_the_cpu(tensors, 1025)


def test_a_whole_search_finds_what_the_cpu_finds() -> None:
    rng = np.random.default_rng(0)
    codes, sizes = rng.integers(0, (3, 2, 4), (15, 3)), (3, 2, 4)
    view = Catalogue([f"i{i}" for i in range(15)]).snapshot()
    index = BeamIndex.build(BeamIndex.Config(width=4), CodeTable(torch.from_numpy(codes), sizes, "t"), view)
    state = SlotLogProbs(torch.from_numpy(-rng.integers(0, 9, (2, 3, 4)) / 2).float(), "t")
    exclude = np.array([0, 1, 2, 3, 4]), np.array([0, 5, 5])
    expected = index.search(state, 3, view, exclude)
    with backend.use("triton"):
        found = index.search(state, 3, view, exclude)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
