# SPDX-License-Identifier: Apache-2.0
"""One step of beam search against loops in plain Python, in all its forms on the CPU, and errors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend, native
from kernels.constrained_step import constrained_step, cpu, reference
from kernels.constrained_step import native as loop
from kernels.constrained_step.reference import Given, Step

FORMS: dict[str, Callable[..., Step]] = {
    "looped": lambda *a: loop.forward(Given(*a[:8]), *a[8:]),
    "padded": lambda *a: cpu.forward(Given(*a[:8]), *a[8:]),
    "reference": reference.constrained_step,
    "float64": lambda *a: reference.constrained_step(a[0].double(), a[1], a[2].double(), *a[3:]),
}


def plain(
    log_probs: Any, nodes: Any, scores: Any, first: Any, codes: Any, alive: Any, closed: list[set[int]], width: int, children: int | None
) -> tuple[list[list[tuple[float, int, int]]], list[bool]]:
    """Of each user the beams, (score, node, parent), and whether anything was left out. Scores are exact in float32."""
    found, cuts = [], []
    for user in range(len(nodes)):
        everything, cut = [], False
        for beam, (node, score) in enumerate(zip(nodes[user], scores[user], strict=True)):
            if score == -math.inf:
                continue
            own = []
            for child in range(first[node], first[node + 1]):
                total = log_probs[user][beam][codes[child]] + score
                if alive[child] and child not in closed[user] and total > -math.inf:
                    own.append((total, child, beam))
            own.sort(key=lambda one: (-one[0], one[1]))
            cut |= children is not None and len(own) > children
            everything += own[:children]
        everything.sort(key=lambda one: (-one[0], one[1]))
        found.append(everything[:width])
        cuts.append(cut or len(everything) > width)
    return found, cuts


def drawn(seed: int, users: int, beams: int, codes: int, nodes: int, spread: int = 8, dead: float = 0.3, closing: float = 0.3) -> list[Any]:
    """The tensors of a step with ties, nodes without children, dead beams anywhere, and every mask."""
    random = torch.Generator().manual_seed(seed)
    has_code = torch.rand(nodes, codes, generator=random) < torch.rand(nodes, 1, generator=random) - 0.1
    first = torch.cat((torch.zeros(1, dtype=torch.int64), has_code.sum(1).cumsum(0)))
    code_of = has_code.nonzero()[:, 1]
    log_probs = torch.randint(-spread, 1, (users, beams, codes), generator=random) / 2
    log_probs[torch.rand(log_probs.shape, generator=random) < 0.1] = -torch.inf
    scores = torch.randint(-spread, 1, (users, beams), generator=random) / 2
    scores[torch.rand(scores.shape, generator=random) < dead] = -torch.inf
    places = torch.rand(users, max(nodes, beams), generator=random).argsort(1)[:, :beams]
    scores[places >= nodes] = -torch.inf
    user, closed = (torch.rand(users, len(code_of), generator=random) < closing).nonzero(as_tuple=True)
    alive = torch.rand(len(code_of), generator=random) < 0.8
    return [log_probs, places, scores, first, code_of, alive, torch.searchsorted(user, torch.arange(users + 1)), closed]


def hold(step: Step, expected: tuple[list[list[tuple[float, int, int]]], list[bool]], width: int) -> None:
    found, cuts = expected
    for user, own in enumerate(found):
        padded = own + [(-math.inf, 0, 0)] * (width - len(own))
        told = zip(step.scores[user].tolist(), step.nodes[user].tolist(), step.parents[user].tolist(), strict=True)
        assert list(told) == padded
    assert step.cut.tolist() == cuts


@pytest.mark.parametrize("form", FORMS)
@given(
    seed=st.integers(0, 10_000),
    users=st.integers(0, 4),
    beams=st.integers(0, 6),
    codes=st.integers(1, 12),
    nodes=st.integers(1, 9),
    width=st.sampled_from([1, 2, 5, 40, 200]),
    children=st.sampled_from([None, 1, 2, 5, 50]),
    spread=st.sampled_from([0, 3, 100]),
)
@settings(max_examples=80, deadline=None)
def test_equals_loops_in_plain_python(
    form: str, seed: int, users: int, beams: int, codes: int, nodes: int, width: int, children: int | None, spread: int
) -> None:
    tensors = drawn(seed, users, beams, codes, nodes, spread)
    log_probs, places, scores, first, code_of, alive, offsets, closed = tensors
    own = [set(closed[offsets[user] : offsets[user + 1]].tolist()) for user in range(users)]
    expected = plain(*(one.tolist() for one in (log_probs, places, scores, first, code_of, alive)), own, width, children)
    step = FORMS[form](*tensors, width, children, False)
    assert step.scores.dtype == (torch.float64 if form == "float64" else torch.float32)
    hold(step, expected, width)
    nothing = [set()] * users
    open_ = [True] * len(code_of)
    without = FORMS[form](*tensors[:5], None, None, None, width, children, False)
    hold(without, plain(*(one.tolist() for one in tensors[:5]), open_, nothing, width, children), width)


@pytest.mark.parametrize("form", FORMS)
def test_renormalised_children_share_one_whatever_may_be_taken(form: str) -> None:
    """Each beam's probabilities sum to one; masks take children out and change no score of the others."""
    tensors = drawn(3, 3, 5, 30, 20, spread=9, dead=0.0)
    tensors[2].zero_()
    everything = FORMS[form](*tensors[:5], None, None, None, 150, None, True)
    there = everything.scores > -torch.inf
    mass = torch.zeros(3, 5, dtype=torch.float64).scatter_add_(1, everything.parents, everything.scores.double().exp() * there)
    has = (tensors[3][tensors[1] + 1] > tensors[3][tensors[1]]).double()
    torch.testing.assert_close(mass, has, rtol=1e-6, atol=0)
    masked = FORMS[form](*tensors, 150, None, True)
    for user in range(3):
        known = dict(zip(everything.nodes[user].tolist(), everything.scores[user].tolist(), strict=True))
        for node, score in zip(masked.nodes[user].tolist(), masked.scores[user].tolist(), strict=True):
            assert score in (known[node], -math.inf)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("renormalise", [False, True])
def test_a_user_alone_gets_the_same_bits(form: str, renormalise: bool) -> None:
    tensors = drawn(5, 6, 7, 200, 30, spread=1000)
    tensors[0] += torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5))
    together = FORMS[form](*tensors, 20, 4, renormalise)
    log_probs, places, scores, first, code_of, alive, offsets, closed = tensors
    for user in range(6):
        own = slice(user, user + 1)
        part = closed[offsets[user] : offsets[user + 1]]
        one = (log_probs[own], places[own], scores[own], first, code_of, alive, torch.tensor([0, len(part)]), part)
        for mine, theirs in zip(FORMS[form](*one, 20, 4, renormalise), together, strict=True):
            assert torch.equal(mine[0], theirs[user])


def test_threads_change_nothing() -> None:
    tensors = drawn(7, 9, 40, 256, 200, spread=1000, dead=0.0)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(constrained_step(*tensors, 50))
    finally:
        torch.set_num_threads(before)
    expected = reference.constrained_step(*tensors, 50)
    for step in found:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(step, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_beams_may_share_their_log_probabilities(form: str) -> None:
    tensors = drawn(11, 3, 5, 20, 9)
    shared = tensors[0][:, :1].expand(-1, 5, -1)
    expected = FORMS[form](shared.contiguous(), *tensors[1:], 8, None, True)
    for mine, theirs in zip(FORMS[form](shared, *tensors[1:], 8, None, True), expected, strict=True):
        assert torch.equal(mine, theirs)


def one_node(values: list[float], score: float = 0.0) -> tuple[Any, ...]:
    """A beam at a node that has all codes."""
    size = len(values)
    start = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), score), torch.tensor([0, size]), torch.arange(size)
    return torch.tensor([[values]]), *start, None, None, None


@pytest.mark.parametrize("form", FORMS)
def test_nan_of_either_sign_and_infinity_come_first_and_minus_zero_is_zero(form: str) -> None:
    minus_nan = -torch.tensor(torch.nan)
    tensors = list(one_node([-1.0, 0.0, math.inf, -0.0, 0.0, -math.inf, -2.0]))
    tensors[0][0, 0, 4] = minus_nan
    step = FORMS[form](*tensors, 3, None, False)
    assert step.nodes.tolist() == [[4, 2, 1]] and step.cut.tolist() == [True]
    assert math.isnan(step.scores[0, 0]) and step.scores[0, 1:].tolist() == [math.inf, 0.0]
    tensors[0][0, 0, 4] = -0.5
    tensors[2][0, 0] = -0.0
    step = FORMS[form](*tensors, 7, None, False)
    assert step.nodes.tolist() == [[2, 1, 3, 4, 0, 6, 0]] and step.cut.tolist() == [False]
    tensors[2][0, 0] = torch.nan  # no beam
    assert FORMS[form](*tensors, 2, None, False).scores.tolist() == [[-math.inf] * 2]


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_renormalised_stays(form: str) -> None:
    for values in ([-math.inf, -math.inf], [math.nan, -1.0], [math.inf, -1.0]):
        step = FORMS[form](*one_node(values), 2, None, True)
        expected = FORMS[form](*one_node(values), 2, None, False)
        np.testing.assert_array_equal(step.scores.numpy(), expected.scores.numpy())


@pytest.mark.parametrize("form", FORMS)
def test_nothing_was_left_out_where_all_just_fits(form: str) -> None:
    tensors = one_node([-1.0, -2.0, -3.0])
    assert [FORMS[form](*tensors, width, None, False).cut.item() for width in (2, 3, 4)] == [True, False, False]
    assert [FORMS[form](*tensors, 9, children, False).cut.item() for children in (2, 3, 4)] == [True, False, False]


@pytest.mark.parametrize("form", FORMS)
def test_a_level_without_children_gives_no_beams(form: str) -> None:
    tensors = list(one_node([]))
    tensors[0] = torch.zeros(1, 1, 4)
    step = FORMS[form](*tensors, 2, None, False)
    assert step.nodes.tolist() == [[0, 0]] and step.scores.tolist() == [[-math.inf] * 2] and step.cut.tolist() == [False]


def test_without_a_compiler_the_same_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn(13, 3, 6, 40, 12)
    expected = constrained_step(*tensors, 10, 3)
    native.load.cache_clear()
    monkeypatch.setenv("RECSYS_NATIVE", "0")
    try:
        assert native.load(loop._SOURCE) is None
        found = constrained_step(*tensors, 10, 3)
    finally:
        native.load.cache_clear()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("log_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("chosen", ["cpu", "native", "reference"])
def test_log_probabilities_and_scores_may_be_of_two_dtypes(log_dtype: torch.dtype, chosen: Any) -> None:
    tensors = drawn(17, 3, 6, 40, 12)
    expected = constrained_step(*tensors, 10)
    tensors[0] = tensors[0].to(log_dtype)
    with backend.use(chosen):
        found = constrained_step(*tensors, 10)
    assert found.scores.dtype == torch.float32
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_nodes_and_codes_that_are_not_there_are_an_error_on_the_cpu() -> None:
    tensors = list(one_node([-1.0, -2.0]))
    for wrong in (-1, 1):
        tensors[1] = torch.tensor([[wrong]])
        with pytest.raises(RuntimeError, match="nodes: a beam stands at no node of first_child"):
            constrained_step(*tensors, 1)
    tensors[2] = torch.tensor([[-math.inf]])
    assert constrained_step(*tensors, 1).scores.item() == -math.inf
    for wrong in (-1, 2):
        tensors = list(one_node([-1.0, -2.0]))
        tensors[4] = torch.tensor([0, wrong])
        with pytest.raises(RuntimeError, match="code_of: a child's code has no log-probability"):
            constrained_step(*tensors, 1)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(2, 3), r"log_probs: expected floating-point \[B, W, V\], got torch.float32 of shape \(2, 3\)"),
        (1, torch.zeros(2, 3, dtype=torch.int32), r"nodes: expected torch.int64 \(2, 3\), as there are log_probs, got torch.int32"),
        (2, torch.zeros(2, 4), r"scores: expected floating-point \(2, 3\), as there are log_probs, got torch.float32 of shape \(2, 4\)"),
        (3, torch.zeros(0, dtype=torch.int64), r"first_child: expected torch.int64 of one axis, first_child not empty"),
        (4, torch.zeros(4), r"code_of: expected torch.int64 of one axis, .* got torch.float32 of shape \(4,\)"),
        (5, torch.ones(1, dtype=torch.bool), r"alive: expected torch.bool \(\d+,\), as there are children, got torch.bool of shape \(1,\)"),
        (6, None, "closed, closed_offsets: expected both or neither"),
        (6, torch.zeros(2, dtype=torch.int64), r"closed_offsets: expected torch.int64 \(3,\), got torch.int64 of shape \(2,\)"),
        (7, torch.zeros(2, 2), r"closed: expected torch.int64 of one axis, got torch.float32 of shape \(2, 2\)"),
    ],
)
def test_an_input_that_does_not_fit_is_an_error_that_names_it(place: int, wrong: Tensor | None, message: str) -> None:
    tensors = drawn(0, 2, 3, 5, 4)
    tensors[place] = wrong
    with pytest.raises(ValueError, match=message):
        constrained_step(*tensors, 2)


@pytest.mark.parametrize(("width", "children"), [(0, None), (2, 0)])
def test_widths_are_at_least_one(width: int, children: int | None) -> None:
    with pytest.raises(ValueError, match=f"width, children: expected at least 1, got {width} and {children}"):
        constrained_step(*drawn(0, 2, 3, 5, 4), width, children)
