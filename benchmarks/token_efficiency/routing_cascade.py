# SPDX-License-Identifier: Apache-2.0
"""R2R: a small and a large retriever generate codes of the next item, where for some last items an earlier event decides."""

import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.frame import Check
from benchmarks.token_efficiency.pruning_needles import fit, seeded
from benchmarks.token_efficiency.routing_sessions import Decoder
from benchmarks.token_efficiency.rows import Row, beside
from recsys.efficiency.routing.r2r import DivergenceRouter, LabelledSteps, Usage, label_steps, positive_weight, routed_greedy, router_loss

ITEMS, MARKERS, HISTORY, LEVELS, CODES = 32, 4, 12, 3, 16
OPEN = 10  # of the items, those after which the marker decides what comes next
QUALITY, AIM = 0.98, 0.99  # of the large model's hit rate: asked on new users, and aimed at on those that the threshold is taken from
USERS = 1024  # whose steps teach the router, and as many that its threshold is taken from
FIRST_CODE = ITEMS + MARKERS
TOKENS = FIRST_CODE + LEVELS * CODES


class World:
    """What comes after which item, and the items' codes.

    Args:
        seed: of both.
    """

    def __init__(self, seed: int) -> None:
        generator = seeded(seed)
        after = torch.stack([torch.randperm(ITEMS, generator=generator)[:MARKERS] for _ in range(ITEMS)])
        is_open = (torch.arange(ITEMS) < OPEN)[:, None]
        self.after = torch.where(is_open, after, after[:, :1])
        flat = torch.randperm(CODES**LEVELS, generator=generator)[:ITEMS]
        self.codes = torch.stack([flat // CODES**level % CODES for level in range(LEVELS)], 1)

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Histories int64 ``[B, 12]``, each with one of 4 markers at some place before the last event, and the next items."""
        history = torch.randint(ITEMS, (rows, HISTORY), generator=generator)
        marker = torch.randint(MARKERS, (rows,), generator=generator)
        place = torch.randint(HISTORY - 1, (rows,), generator=generator)
        history[torch.arange(rows), place] = ITEMS + marker
        return history, self.after[history[:, -1], marker]


class Retriever:
    """A decoder over histories and codes; prefixes begin with the number of a row of ``histories``.

    Args:
        model: it.
        histories: int64 ``[B, 12]``.
    """

    def __init__(self, model: Decoder, histories: Tensor) -> None:
        self.model, self.histories = model, histories

    def small(self, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """See `SmallStep`."""
        hidden = self.model.states(sequences(self.histories[prefixes[:, 0]], prefixes[:, 1:]))[:, -1]
        return self.model.head(hidden), hidden

    def large(self, prefixes: Tensor) -> Tensor:
        """See `LargeStep`."""
        return self.small(prefixes)[0]


def sequences(history: Tensor, codes: Tensor) -> Tensor:
    """Tokens of histories and codes; a code is another token at each level."""
    return torch.cat((history, FIRST_CODE + CODES * torch.arange(codes.shape[1]) + codes), 1)


def trained(model: Decoder, world: World, steps: int, seed: int, rows: int = 64) -> Decoder:
    """Taught to say the codes of next items."""
    generator = seeded(seed)

    def loss() -> Tensor:
        history, item = world.draw(rows, generator)
        codes = world.codes[item]
        logits = model(sequences(history, codes[:, :-1]))[:, -LEVELS:]
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    fit(model.parameters(), steps, loss, rate=3e-3)
    return model.eval()


def parameters(model: Decoder) -> int:
    """How many there are."""
    return sum(p.numel() for p in model.parameters())


def trained_router(small: Decoder, large: Decoder, world: World, steps: int, seed: int) -> tuple[DivergenceRouter, float]:
    """A router that learned where the models part, and the highest threshold with .99 of the large model's hits on users of its own.

    It is as narrow as the small model: the paper's has 0.2% of the large one's parameters.
    """
    generator = seeded(10_000 + seed)
    embedding = small.tokens.weight[FIRST_CODE:].detach().view(LEVELS, CODES, -1)
    router = DivergenceRouter(embedding.shape[2], embedding, DivergenceRouter.Config(top=CODES, width=16, blocks=1, dropout=0.0))
    train = labelled(small, large, world.draw(USERS, generator)[0])
    weight = positive_weight(train.label)

    def loss() -> Tensor:
        picked = torch.randint(len(train.label), (256,), generator=generator)
        logits = router(train.hidden[picked], train.code[picked], train.logits[picked], train.level[picked])
        return router_loss(logits, train.label[picked], weight)

    fit(router.parameters(), steps, loss, rate=3e-3)
    return router, chosen_threshold(router.eval(), small, large, world, world.draw(USERS, generator))


def chosen_threshold(router: DivergenceRouter, small: Decoder, large: Decoder, world: World, drawn: tuple[Tensor, Tensor]) -> float:
    """The highest of 20 thresholds that is good enough for these users; 0, the large model alone, where none is."""
    histories, item = drawn
    one, other, start = Retriever(small, histories), Retriever(large, histories), torch.arange(len(item))[:, None]

    def hits(theta: float) -> float:
        found = routed_greedy(one.small, other.large, router.score, theta, LEVELS, start).codes
        return float((found == world.codes[item]).all(1).double().mean())

    aim = AIM * hits(0.0)
    return next((theta for theta in torch.linspace(1.0, 0.05, 20).tolist() if hits(theta) >= aim), 0.0)


def labelled(small: Decoder, large: Decoder, histories: Tensor) -> LabelledSteps:
    """The steps at which the small model would make the large one end at another item."""
    start = torch.arange(len(histories))[:, None]
    one, other = Retriever(small, histories), Retriever(large, histories)
    return label_steps(one.small, other.large, LEVELS, start, lambda a, b: (a == b).all(1), CODES)


@dataclass(frozen=True)
class Cascade:
    """Hit rates of the next item, and what it took.

    Attributes:
        hits: of the small model, the large one, and both with the router.
        usage: of the latter.
        active: parameters of a step as a share of the large model's, with the router's.
    """

    hits: tuple[float, float, float]
    usage: Usage
    active: float


def cascade(seed: int, steps: int, tested: int = 1024) -> tuple[Cascade, tuple[Retriever, Retriever, DivergenceRouter, float]]:
    """Train all three and try them on new users."""
    torch.manual_seed(seed)
    world, places = World(seed), HISTORY + LEVELS
    large = trained(Decoder(TOKENS, places, CODES, dim=48, layers=3, heads=4), world, steps, seed)
    small = trained(Decoder(TOKENS, places, CODES, dim=16, layers=1), world, 2 * steps, seed)  # cheap, and slower to learn
    router, theta = trained_router(small, large, world, steps, seed)
    histories, item = world.draw(tested, seeded(20_000 + seed))
    models, start = (Retriever(small, histories), Retriever(large, histories)), torch.arange(tested)[:, None]
    found = [routed_greedy(models[0].small, models[1].large, router.score, t, LEVELS, start) for t in (1.1, 0.0, theta)]
    hits = tuple(float((own.codes == world.codes[item]).all(1).double().mean()) for own in found)
    head = sum(p.numel() for p in router.parameters())
    active = found[2].usage.active(parameters(small) + head, parameters(large)) / parameters(large)
    return Cascade((hits[0], hits[1], hits[2]), found[2].usage, active), (*models, router, theta)


def r2r(seeds: range, steps: int) -> tuple[Row, Check]:
    """Parameters that a step activates and the hit rate, beside the large model's."""
    runs = [cascade(seed, steps) for seed in seeds]
    found = [run[0] for run in runs]
    small, large, both = (statistics.fmean(own.hits[i] for own in found) for i in range(3))
    active, share = statistics.fmean(own.active for own in found), statistics.fmean(own.usage.share for own in found)
    one, other, router, theta = runs[0][1]
    start = torch.arange(512)[:, None]
    sizes = f"{parameters(one.model):,} and {parameters(other.model):,} parameters"
    told = f"hit rate {small:.4f} small, {large:.4f} large, {both:.4f} routed: {both / large:.3f}; {share:.1%} of the steps routed"
    row = Row(
        "r2r",
        f"{LEVELS} codes of {CODES} after {HISTORY} events, a marker decides after {OPEN} of {ITEMS} items, {sizes}",
        1 / active,
        "active parameters",
        beside(
            lambda: routed_greedy(one.small, other.large, router.score, 0.0, LEVELS, start),
            lambda: routed_greedy(one.small, other.large, router.score, theta, LEVELS, start),
        ),
        "2.8 of time beside R1-32B at like accuracy, 5.6B of 32B parameters active",
        told,
    )
    note = (
        f"Usage.active of the large model's parameters, the router's counted with the small one: {active:.3f}; {told}; {len(found)} seeds"
    )
    return row, Check("r2r_active_parameters", round(active, 4) if both >= QUALITY * large else 1.0, at_most=0.4, note=note)
