# SPDX-License-Identifier: Apache-2.0
"""Pruning inside trained models: TransPrune, Adaptive Sparse ViT, and CoreMatching's sliced feed-forward networks."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.frame import Check
from benchmarks.token_efficiency.pruning_needles import (
    CLASSES,
    ITEMS,
    NOISE,
    QUERY,
    Reader,
    Sizes,
    accuracy,
    fit,
    needles,
    seeded,
    trained_reader,
)
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.cost import Cost
from recsys.efficiency.pruning.adaptive_sparse import AdaptiveSparseEncoder, distillation_loss, layer_macs
from recsys.efficiency.pruning.core_matching import core_frequency, sentence_core, slice_ffn, token_core
from recsys.efficiency.pruning.transprune import Plan, TransPrune, plan
from recsys.efficiency.routing.dispatch import BudgetLoss
from recsys.efficiency.schedule import PruneSchedule
from recsys.efficiency.scoring import Random
from recsys.efficiency.selection import RowSelection
from recsys.efficiency.selectors import TopK
from recsys.efficiency.view import TokenView, offsets_of

DEPTH = 8
LOCAL = min(plan(DEPTH).keep) + 1  # the layers up to the first that drops: its score reads the attention of the next, which is not local
QUALITY = 0.99
BETA = RHO = 0.4
STAGES, BUDGET, NESTED = (2, 4, 5), 0.65, (0.7, 0.49, 0.343)  # the paper's stages before layers 4, 7 and 10 of 12, for 6 layers


def macs(call: Callable[[], object]) -> int:
    """Multiply-adds of a call."""
    with Cost() as cost, torch.no_grad():
        call()
    return cost.macs


def at_quality(saved: float, quality: float) -> float:
    """The share of the dense multiply-adds; that of the dense model, 1, where the quality is missed and only the dense one has it."""
    return round(saved, 4) if quality >= QUALITY else 1.0


def kept_quality(before: list[float], after: list[float]) -> float:
    """The mean accuracy after over the mean before; 0 where there was none."""
    dense = statistics.fmean(before)
    return statistics.fmean(after) / dense if dense else 0.0


# TransPrune


def pruned(model: Reader, items: Tensor, scaled: Plan, chance: bool = False) -> tuple[Tensor, RowSelection]:
    """Logits ``[B, 8]`` of a reader whose tokens are dropped by TransPrune's plan, by its score or by chance; what is left."""
    scorer = Random.Config() if chance else TransPrune.Config(layers=scaled.layers)
    schedule = PruneSchedule(PruneSchedule.Config(keep=scaled.keep, scorer=scorer, selector=TopK.Config()))
    values, chosen = schedule(model.probed(() if chance else tuple(scaled.keep)), model.view(items))
    return model.answer(values, chosen.offsets), chosen


def pruned_answer(model: Reader, items: Tensor, scaled: Plan, chance: bool = False) -> Tensor:
    """The logits alone."""
    return pruned(model, items, scaled, chance)[0]


def needle_kept(items: Tensor, chosen: RowSelection) -> str:
    """The share of the histories whose planted event is left, beside that of all tokens."""
    there = ((items >= NOISE) & (items < QUERY)).flatten()
    return f"needle left in {float(chosen.mask()[there].double().mean()):.1%} beside {len(chosen.index) / chosen.size:.1%} of all tokens"


def layer_macs_of(tokens: int, dim: int, local: bool) -> int:
    """The closed formula of a reader's layer: a causal query reads the tokens up to itself; a mask, as of a local one, counts all pairs."""
    return 12 * dim * dim * tokens + (2 * dim * tokens * tokens if local else dim * tokens * (tokens + 1))


def dense_macs(length: int, dim: int, depth: int, rows: int = 1, local: int = 0) -> int:
    """Of a reader without its embeddings."""
    return rows * (sum(layer_macs_of(length, dim, layer < local) for layer in range(depth)) + dim * CLASSES)


def pruned_macs(length: int, dim: int, scaled: Plan, rows: int = 1, local: int = 0) -> int:
    """The same under a plan: the tokens that are left, and the last token's look at them where some are dropped."""
    total, now = 0, length
    for layer in range(scaled.depth):
        total += layer_macs_of(now, dim, layer < local)
        if layer in scaled.keep:
            total += dim * dim * (now + 1) + dim * now  # keys, one query, their products
            now = 1 + max(round((length - 1) * scaled.keep[layer]), 1)
    return rows * (total + dim * CLASSES)


def transprune(models: dict[int, Reader], sizes: Sizes) -> tuple[Row, Check]:
    """The paper's plan for trained readers; time at the specification's 8 layers of width 64 over 1,024 events."""
    scaled = plan(DEPTH)
    before, after, chance, shares = list[float](), list[float](), list[float](), list[float]()
    for seed, model in models.items():
        items = needles(64, sizes.length, seeded(20_000 + seed))[0]
        ours, random = (partial(pruned_answer, model, scaled=scaled, chance=chosen) for chosen in (False, True))
        shares.append(macs(partial(ours, items)) / macs(partial(model, items)))
        for own, answer in ((before, model), (after, ours), (chance, random)):
            own.append(accuracy(answer, sizes, seed))
    quality, share = kept_quality(before, after), statistics.fmean(shares)
    left = needle_kept(items, pruned(model, items, scaled)[1])
    torch.manual_seed(0)
    large = Sizes(length=1024, dim=64)
    untrained = Reader(large, DEPTH).eval()
    items = needles(2, large.length, seeded(0))[0]
    told = f"accuracy {_spread(before)} dense, {_spread(after)} pruned: {quality:.3f} (random tokens {_spread(chance)}); {left}"
    row = Row(
        "transprune",
        f"trained: {DEPTH} layers, {LOCAL} local, d={sizes.dim}, N={sizes.length}, keep {_plan(scaled)}; time: none local, d=64, N=1024",
        1 / share,
        f"MACs ({dense_macs(1024, 64, DEPTH) / pruned_macs(1024, 64, scaled):.2f} at d=64, N=1024)",
        beside(lambda: untrained(items), lambda: pruned_answer(untrained, items, scaled)),
        "2.45 of TFLOPs (40.8%) at 100.0% of the accuracy, LLaVA-1.5-7B",
        told,
    )
    note = f"Cost.macs of the trained models, pruned over dense, with what scoring takes: {share:.3f}; {told}, {len(models)} seeds"
    return row, Check("transprune_flops", at_quality(share, quality), at_most=0.5, note=note)


def _plan(scaled: Plan) -> str:
    return ", ".join(f"{share} after layer {layer + 1}" for layer, share in sorted(scaled.keep.items()))


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


# CoreMatching


def sliced_answer(model: Reader, items: Tensor) -> Tensor:
    """Logits ``[B, 8]`` where the last token's feed-forward networks have their row's core neurons alone, as in decoding.

    What a masked activation gives is what a sliced network gives (`slice_ffn`); the core is that of the history before the last token.
    """
    view = model.view(items)
    for layer in model.layers:
        view = view.with_values(layer(view, slicing=_last_sliced)[0])
    return model.answer(view.values, view.offsets)


def _last_sliced(view: TokenView, hidden: Tensor) -> Tensor:
    last = view.offsets[1:] - 1
    before = torch.ones(len(hidden), dtype=torch.bool)
    before[last] = False
    core = sentence_core(core_frequency(token_core(hidden[before], RHO), offsets_of(view.lengths - 1)), BETA)
    return hidden.index_copy(0, last, hidden[last] * core)


def core_matching(models: dict[int, Reader], sizes: Sizes, rows: int = 16, steps: int = 4) -> tuple[Row, Check]:
    """Decoding through a feed-forward network of 512 by 2,048 with 40% of its neurons, the slice made once for an item of 4 codes."""
    torch.manual_seed(0)
    enter, leave = nn.Linear(512, 2048), nn.Linear(2048, 512)
    hidden = enter(torch.randn(64, 512)).relu()
    core = sentence_core(core_frequency(token_core(hidden, RHO), torch.tensor([0, 64])), BETA)
    sliced, x = slice_ffn(core, (enter, leave), F.relu), torch.randn(rows, 512)
    saved = macs(lambda: leave(enter(x).relu())) / macs(lambda: sliced(x))
    with Cost() as slicing:
        slice_ffn(core, (enter, leave), F.relu)
    before = [accuracy(model, sizes, seed) for seed, model in models.items()]
    after = [accuracy(partial(sliced_answer, model), sizes, seed) for seed, model in models.items()]
    several = beside(
        lambda: [leave(enter(x).relu()) for _ in range(steps)],
        lambda: [made(x) for made in [slice_ffn(core, (enter, leave), F.relu)] for _ in range(steps)],
    )
    row = Row(
        "core_matching",
        f"decode FFN, D=512, F=2048, {BETA:.0%} kept, {rows} beams; {several.estimate:.2f} in time with slicing for {steps} codes",
        saved,
        f"MACs (slicing gathers {slicing.gathered_bytes / 2**20:.1f} MiB once)",
        beside(lambda: [leave(enter(x).relu()) for _ in range(20)], lambda: [sliced(x) for _ in range(20)]),
        "5 of FLOPs in all, 9.2 of decoding time where weights are offloaded, Titan Xp",
        f"trained readers: accuracy {_spread(before)} dense, {_spread(after)} with sliced networks for the last token",
    )
    note = "Cost.macs of the decoding feed-forward network, dense over sliced; slicing itself multiplies nothing"
    return row, Check("core_matching_decode", round(saved, 3), at_least=1.8, note=note)


# Adaptive Sparse ViT


class Sparse(nn.Module):
    """An `AdaptiveSparseEncoder` over histories; without ``stages`` the dense one."""

    def __init__(self, sizes: Sizes, layers: int, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.items, self.places = nn.Embedding(ITEMS, sizes.dim), nn.Embedding(sizes.length, sizes.dim)
        nn.init.normal_(self.places.weight, std=0.1)
        config = AdaptiveSparseEncoder.Config(
            dim=sizes.dim, heads=sizes.heads, layers=layers, stages=stages, thresholds=(0.0,) * len(stages)
        )
        self.encoder, self.head = AdaptiveSparseEncoder(config), nn.Linear(sizes.dim, CLASSES)

    def view(self, items: Tensor) -> TokenView:
        """The tokens of histories ``[B, N]``."""
        rows, length = items.shape
        values = self.items(items) + self.places(torch.arange(length))
        return TokenView.of(values.flatten(0, 1), torch.arange(rows + 1) * length)

    def forward(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, 8]`` from the class token, and the layers' costs as shares of the dense ones."""
        found = self.encoder(self.view(items))
        return self.head(found.context[:, 0]), found.costs

    def answer(self, items: Tensor) -> Tensor:
        """The logits alone."""
        logits: Tensor = self(items)[0]
        return logits


def sparse_pair(seed: int, sizes: Sizes, layers: int = 6) -> tuple[Sparse, Sparse]:
    """A trained dense encoder, and one that was tuned from it to a budget of multiply-adds by the paper's three losses."""
    torch.manual_seed(seed)
    dense, generator = Sparse(sizes, layers, ()).eval(), seeded(seed)  # nothing is dropped: the gathered form trains faster than the masked

    def task() -> Tensor:
        items, label, _ = needles(sizes.batch, sizes.length, generator)
        return F.cross_entropy(dense(items)[0], label)

    fit(dense.parameters(), sizes.steps, task)
    sparse = Sparse(sizes, layers, STAGES)
    sparse.load_state_dict(dense.state_dict(), strict=False)
    sparse.encoder.calibrate(sparse.view(needles(128, sizes.length, generator)[0]), NESTED)
    _tune(sparse, dense, sizes, generator)
    return dense.requires_grad_(False), sparse.eval().requires_grad_(False)  # the counter of calls wants no gradients


def _tune(sparse: Sparse, dense: Sparse, sizes: Sizes, generator: torch.Generator) -> None:
    budget = BudgetLoss(BudgetLoss.Config(budget=BUDGET, weight=2.0))

    def loss() -> Tensor:
        items, label, _ = needles(sizes.batch, sizes.length, generator)
        logits, costs = sparse(items)
        with torch.no_grad():
            teacher = dense(items)[0]
        total: Tensor = F.cross_entropy(logits, label) + budget(costs) + 0.5 * distillation_loss(logits, teacher)
        return total

    thresholds = list(sparse.encoder.thresholds.parameters())
    others = [p for name, p in sparse.named_parameters() if "threshold" not in name]
    sparse.train()
    fit([{"params": others, "lr": 5e-4}, {"params": thresholds, "lr": 1e-4}], sizes.tuning, loss)


def adaptive_sparse(seeds: range, sizes: Sizes) -> tuple[Row, Check]:
    """Learned thresholds at the paper's budget; time at its 12 layers of width 384 over 197 tokens, 0.7 kept at each stage."""
    before, after, shares = list[float](), list[float](), list[float]()
    for seed in seeds:
        dense, sparse = sparse_pair(seed, sizes)
        items = needles(64, sizes.length, seeded(20_000 + seed))[0]
        shares.append(macs(partial(sparse, items)) / macs(partial(dense, items)))
        before.append(accuracy(dense.answer, sizes, seed))
        after.append(accuracy(sparse.answer, sizes, seed))
    quality, share = kept_quality(before, after), statistics.fmean(shares)
    left = needle_kept(items, sparse.encoder(sparse.view(items)).selection)
    large, thinned, view = published_size()
    told = f"accuracy {_spread(before)} dense, {_spread(after)} pruned: {quality:.3f}; {left}"
    row = Row(
        "adaptive_sparse",
        f"trained: 6 layers, d={sizes.dim}, N={sizes.length}, stages before 3, 5 and 6, budget {BUDGET}; time: 12 layers, D=384, N=197",
        1 / share,
        f"MACs ({macs(lambda: large(view)) / macs(lambda: thinned(view)):.2f} at D=384, N=197, 0.7 kept at each stage)",
        beside(lambda: large(view), lambda: thinned(view)),
        "1.5 of throughput at -0.2 top-1, DeiT-S, budget 0.65 of FLOPs",
        told,
    )
    spread = f"{share:.3f} ({min(shares):.3f} to {max(shares):.3f})"
    note = f"Cost.macs of the trained models, pruned over dense, with padding: {spread}; {told}, {len(seeds)} seeds"
    return row, Check("adaptive_sparse_macs", at_quality(share, quality), at_most=0.7, note=note)


def published_size(dim: int = 384, tokens: int = 196) -> tuple[AdaptiveSparseEncoder, AdaptiveSparseEncoder, TokenView]:
    """A dense and a calibrated encoder of the paper's size, untrained, and a row of tokens beside the class token."""
    torch.manual_seed(0)
    dense = AdaptiveSparseEncoder(AdaptiveSparseEncoder.Config(dim=dim, heads=6, stages=(), thresholds=())).eval()
    sparse = AdaptiveSparseEncoder(AdaptiveSparseEncoder.Config(dim=dim, heads=6)).eval()
    sparse.load_state_dict(dense.state_dict(), strict=False)
    view = TokenView.of(torch.randn(tokens, dim), torch.tensor([0, tokens]))
    sparse.calibrate(view, NESTED)
    return dense.requires_grad_(False), sparse.requires_grad_(False), view


def sparse_macs(counts: list[int], dim: int) -> float:
    """The closed formula of an encoder's layers with so many tokens each, the class token among them."""
    return float(layer_macs(torch.tensor(counts, dtype=torch.float64), dim, 4 * dim).sum())


def measure(seeds: range, sizes: Sizes) -> list[tuple[Row, Check]]:
    """The three, on models of these seeds."""
    models = {seed: trained_reader(seed, sizes, DEPTH, LOCAL) for seed in seeds}
    return [transprune(models, sizes), adaptive_sparse(seeds, sizes), core_matching(models, sizes)]
