# SPDX-License-Identifier: Apache-2.0
"""Token by token: our trie and cached beams beside transformers' ``generate``, on the same weights and with the same results."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.frame import Check, Ratio, mean_interval, ratio
from recsys.data.batch import SequenceBatch
from recsys.retrieval.catalogue import BeamIndex, Catalogue, CatalogueView
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.items import ItemTable
from recsys.retrieval.models import TIGER
from recsys.retrieval.state import PrefixScorer, SlotLogProbs
from recsys.retrieval.t5 import BeamDecoder
from recsys.training.progress import track

ITEMS, LEVELS, CODES, HISTORY = 20_000, 4, 256, 20
USERS = 8
_TOLERANCE = 1e-4  # of scores; items whose scores are nearer than that may change places

Found = tuple[np.ndarray, np.ndarray]  # codes [B, W, L], scores [B, W]


@dataclass
class Setting:
    """TIGER at its published size with random weights, the same weights in transformers, a catalogue and users."""

    model: TIGER
    theirs: Any
    index: BeamIndex
    view: CatalogueView
    batch: SequenceBatch
    allowed: dict[tuple[int, ...], list[int]]


def setting(seed: int = 0) -> Setting:
    """Draw everything."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    codes = torch.unique(torch.randint(0, CODES, (2 * ITEMS, LEVELS)), dim=0)
    codes = codes[torch.randperm(len(codes))[:ITEMS]]
    items = ItemTable(ITEMS, torch.ones(ITEMS, dtype=torch.bool), codes=CodeTable(codes, (CODES,) * LEVELS, "drawn"))
    config = TIGER.Config(softmax="vocabulary")
    sizes: dict[str, Any] = {
        "d_model": config.dim,
        "d_kv": config.head_dim,
        "d_ff": config.ffn,
        "num_layers": config.layers,
        "num_heads": config.heads,
    }
    tokens: dict[str, Any] = {"vocab_size": 1 + LEVELS * CODES, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": None}
    theirs = T5ForConditionalGeneration(T5Config(**sizes, **tokens, feed_forward_proj="relu", tie_word_embeddings=True)).eval()
    with torch.no_grad():
        theirs.shared.weight.mul_(2.0)  # sharper than at the start of training, so that beams differ
    model = TIGER(config, items).eval()
    model.t5.load_transformers(theirs.state_dict())
    view = Catalogue([str(i) for i in range(ITEMS)]).snapshot()
    batch = SequenceBatch(torch.randint(0, ITEMS, (USERS * HISTORY,)), torch.arange(USERS + 1) * HISTORY)
    return Setting(model, theirs, BeamIndex.over(BeamIndex.Config(), model, view), view, batch, _allowed(model))


def _allowed(model: TIGER) -> dict[tuple[int, ...], list[int]]:
    """The tokens after each prefix, start token included: what most projects hand to ``prefix_allowed_tokens_fn``."""
    found: dict[tuple[int, ...], set[int]] = {}
    for row in model.tokens.tolist():
        for level, token in enumerate(row):
            found.setdefault((0, *row[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in found.items()}


def ours(case: Setting, width: int) -> Callable[[], Found]:
    """The catalogue's beam: encode, search."""
    index = BeamIndex(BeamIndex.Config(width=width), case.index.table, case.index.meta, case.index.trie)

    def call() -> Found:
        rows, scores = index.search(case.model.encode(case.batch), width, case.view)
        return index.table.codes.numpy()[rows], scores

    return call


def free(case: Setting, width: int, whole: bool) -> Callable[[], Found]:
    """Our beams without a catalogue, over the whole vocabulary as transformers has it, or over each level's codes."""

    def call() -> Found:
        state = case.model.encode(case.batch)
        scorer = _Vocabulary(case.model, state.values, state.valid) if whole else state.begin()
        return free_search(scorer, USERS, LEVELS, width)

    return call


class _Vocabulary:
    """The decoder over all tokens at every level, in the catalogue's levels or not."""

    def __init__(self, model: TIGER, memory_bsd: Tensor, valid_bs: Tensor) -> None:
        self._t5, self._decoder = model.t5, BeamDecoder(model.t5, memory_bsd, valid_bs)

    def step(self, parents_bw: Tensor, codes_bw: Tensor) -> Tensor:
        """See `PrefixScorer.step`; a code is a token."""
        states = self._decoder.advance(parents_bw, codes_bw.clamp(min=0))
        return self._t5.logits(states, slice(None)).log_softmax(-1)


def free_search(scorer: PrefixScorer, users: int, levels: int, width: int) -> Found:
    """The best sequences of codes, in the catalogue or not."""
    scores, sequences = torch.zeros(users, 1), torch.zeros(users, 1, 0, dtype=torch.int64)
    parents = codes = torch.full((users, 1), -1)
    for level in range(levels):
        log_probs = scorer.step(parents, codes)
        scores, place = (scores[..., None] + log_probs).flatten(1).topk(width)
        parents, codes = place // log_probs.shape[-1], place % log_probs.shape[-1]
        sequences = torch.cat((sequences.gather(1, parents[..., None].expand(-1, -1, level)), codes[..., None]), -1)
    return sequences.numpy(), scores.numpy()


def transformers_beams(case: Setting, width: int, constrained: bool) -> Callable[[], Found]:
    """``generate`` with as many beams."""
    lengths = case.batch.lengths
    tokens = torch.cat((torch.zeros(USERS, 1, dtype=torch.int64), case.model.tokens[case.batch.items.view(USERS, -1)].flatten(1)), 1)
    assert bool((lengths == HISTORY).all())

    def after(_: int, prefix: Tensor) -> list[int]:
        return case.allowed[tuple(prefix.tolist())]

    def call() -> Found:
        made = case.theirs.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=LEVELS,
            do_sample=False,
            length_penalty=0.0,
            return_dict_in_generate=True,
            output_scores=True,
            prefix_allowed_tokens_fn=after if constrained else None,
        )
        sequences = made.sequences[:, 1:].view(USERS, width, LEVELS)
        return sequences.numpy(), made.sequences_scores.view(USERS, width).numpy()

    return call


def same(a: Found, b: Found) -> bool:
    """Whether two searches found the same: equal scores place by place, and equal codes but for near ties."""
    if np.abs(a[1] - b[1]).max() > _TOLERANCE:
        return False
    differ = (a[0] != b[0]).any(-1)
    gap = np.abs(np.diff(a[1], axis=1, prepend=np.inf, append=-np.inf))
    near = (gap[:, :-1] < _TOLERANCE) | (gap[:, 1:] < _TOLERANCE)
    return bool((near | ~differ).all())


@torch.inference_mode()
def measure(quick: bool) -> tuple[list[dict[str, Any]], list[Check]]:
    """The rows and the checks of this part."""
    case, pairs = setting(), 5 if quick else 9
    codes = case.model.token_of
    rows, checks = [], []
    plan: list[tuple[str, float, int, Callable[[], Found], Callable[[], Found], int]] = [
        ("hf_trie_beam10", 20, 10, ours(case, 10), transformers_beams(case, 10, True), pairs),
        ("hf_trie_beam50", 20, 50, ours(case, 50), transformers_beams(case, 50, True), 5),
        ("hf_unconstrained_beam50", 5, 50, free(case, 50, True), transformers_beams(case, 50, False), 5),
    ]
    for name, bound, width, mine, theirs, count in track(plan, "token by token"):
        a, b = mine(), theirs()
        if "trie" in name:
            a = (a[0] + np.array([int(codes(torch.tensor(0), level)) for level in range(LEVELS)]), a[1])
        if not same(a, b):
            raise RuntimeError(f"{name}: the two searches found different items")
        seconds = _alternate(mine, theirs, count)
        speed = ratio(seconds[1], seconds[0])
        rows.append(_row(name, width, seconds, speed))
        checks.append(speed.at_least(name, bound))
    row, check = _overhead(case, 50, 3 * pairs)
    return [*rows, row], [*checks, check]


def _overhead(case: Setting, width: int, pairs: int) -> tuple[dict[str, Any], Check]:
    """What the trie adds to a search without one, as a share of a step with the model.

    Both searches are timed on distributions that are there already, which leaves out the model's time and its noise; the step is the free
    search with the model.
    """
    index = BeamIndex(BeamIndex.Config(width=width), case.index.table, case.index.meta, case.index.trie)
    state = SlotLogProbs((2 * torch.randn(USERS, LEVELS, CODES)).log_softmax(-1), case.index.table.tokenizer)
    calls = (lambda: index.search(state, width, case.view), lambda: free_search(state.begin(), USERS, LEVELS, width))
    with_trie, without = _alternate(*calls, pairs)
    (step, _) = _alternate(free(case, width, False), lambda: None, pairs)
    shares = [(a - b) / c for a, b, c in zip(with_trie, without, step, strict=True)]
    mean, low, high = mean_interval(shares)
    median = {name: 1e3 * float(np.median(s)) for name, s in (("trie", with_trie), ("free", without), ("step", step))}
    note = (
        f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]; search {median['trie']:.1f} ms, free {median['free']:.1f} ms, step {median['step']:.0f} ms"
    )
    row = {"what": "constraint_overhead", "beams": width, **{f"{name}, ms": value for name, value in median.items()}}
    return row, Check("constraint_overhead", round(high, 4), at_most=0.02, note=note)


def _alternate(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each, in turns, after one turn that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(pairs + 1):
        for call, kept in zip((first, second), seconds, strict=True):
            start = perf_counter()
            call()
            if turn:
                kept.append(perf_counter() - start)
    return seconds


def _row(name: str, width: int, seconds: tuple[list[float], list[float]], speed: Ratio) -> dict[str, Any]:
    first, second = (float(np.median(s)) for s in seconds)
    return {"what": name, "beams": width, "ours, users/s": USERS / first, "other, users/s": USERS / second, "ratio": speed.estimate}
