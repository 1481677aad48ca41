# SPDX-License-Identifier: Apache-2.0
"""Impressions whose best possible AUC and log-loss are known, since the probability of every label is.

The logit is ``bias + logit_std · Σ_part √share · part(row)``. Fields are independent, and every part is a sum of functions that are
centred in each of their fields under the field's own distribution, over sets of fields that no other part uses: the functional ANOVA
(Hoeffding) decomposition. So the parts are uncorrelated and each has variance 1 exactly; ``share`` is its share of the logit's variance.

Field f's value v has hidden factors ``z_f[v]``, whitened under the field's distribution. All parts but the sequence's are functions of
the same factors, so that what lower parts teach helps with higher ones: products of three or more factors alone leave gradient descent at
a saddle (the "leap" of Abbe et al., arXiv 2302.11055).

- main: ``u_f · z_f[v]`` for every field, a linear effect of every dense column, and the candidate item's.
- pairwise: ``z_a · z_b``, a and b in different groups.
- high_order: ``Σ_k z_ak z_bk z_ck …`` over ``order`` fields of different groups: a parity where factors are signs.
- token_wise: for each group, ``Σ_j cos(Σ_f (ω_jf · z_f) + β_j)`` over its own fields less its mean and main effects: a function that a
  token's own network can learn, another one for each token.
- token_pairs: products of the functions of two groups: what interacts are the groups' own readings, as user's and item's preferences do,
  and not single fields.
- sequence: ``Σ_i w_i S[candidate, item_i]`` with weights γ^age over the history, and S a kernel ``exp(z_c · z_i / τ)`` of latent items.

Only numpy draws rows; 4096 rows are drawn at a time by (seed, number of the block), so that any rows can be drawn by themselves.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from recsys.core.config import Config as BaseConfig

BLOCK = 4096
PARTS = ("main", "pairwise", "high_order", "token_wise", "token_pairs", "sequence")
_SLOTS = 1 << 16  # probabilities are multiples of 1/65536, so that a uint16 draws a value and the distribution is known exactly
_WAVES = 4  # cosines in a group's function
_TEMPERATURE = 1.5  # of the kernel between items


class Shares(BaseConfig):
    """How much of the logit's variance each part explains; together 1."""

    main: float = Field(0.3, ge=0, le=1)
    pairwise: float = Field(0.2, ge=0, le=1)
    high_order: float = Field(0.2, ge=0, le=1)
    token_wise: float = Field(0.3, ge=0, le=1)
    token_pairs: float = Field(0.0, ge=0, le=1)
    sequence: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        if abs(sum(self.as_array()) - 1) > 1e-6:
            raise ValueError(f"shares: expected a sum of 1, got {sum(self.as_array()):g}")
        return self

    def as_array(self) -> np.ndarray:
        """In the order of `PARTS`."""
        return np.array([getattr(self, part) for part in PARTS])


class Impressions(BaseConfig):
    """What decides every row.

    Attributes:
        fields: categorical fields, in ``groups`` groups of neighbours.
        cardinality: the fewest and the most values of a field; fields' numbers are spread evenly between, on a logarithmic scale.
        zipf: exponent of the values' frequencies.
        dense: dense columns, standard normal.
        history: the most events of a history; lengths are uniform from 0. 0 for no history.
        items: the catalogue of candidates and histories.
        recency: γ, the weight of an event relative to the next later one.
        groups: groups of fields; each has a function of its own.
        latent: hidden factors of a value.
        factors: ``normal``, or ``sign`` for factors that are ±1 before whitening, whose products are parities.
        order: fields in a product of the high-order part.
        products: how many products there are.
        pairs: how many pairs of fields interact.
        group_pairs: how many pairs of groups do.
        frequency: standard deviation of a group's phase; more of it makes the groups' functions rougher.
        shares: of the logit's variance.
        logit_std: standard deviation of the logit.
        bias: its mean.
        seed: of the hidden parameters and of all rows.
    """

    fields: int = Field(20, ge=4)
    cardinality: tuple[int, int] = (50, 1000)
    zipf: float = Field(1.0, ge=0)
    dense: int = Field(4, ge=0)
    history: int = Field(0, ge=0)
    items: int = Field(500, ge=2, le=4096)
    recency: float = Field(0.8, gt=0, le=1)
    groups: int = Field(5, ge=2)
    latent: int = Field(3, ge=1)
    factors: Literal["normal", "sign"] = "normal"
    order: int = Field(3, ge=3)
    products: int = Field(6, ge=1)
    pairs: int = Field(10, ge=1)
    group_pairs: int = Field(6, ge=1)
    frequency: float = Field(1.5, gt=0)
    shares: Shares = Shares()
    logit_std: float = Field(1.6, gt=0)
    bias: float = -1.0
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        low, high = self.cardinality
        if not 2 <= low <= high <= 4096:
            raise ValueError(f"cardinality: expected 2 <= fewest <= most <= 4096, got {self.cardinality}")
        if self.latent >= low:
            raise ValueError(f"latent: expected fewer factors than the smallest field has values ({low}), got {self.latent}")
        if self.fields < 2 * self.groups:
            raise ValueError(f"groups: expected at least two fields in each of {self.groups} groups, got {self.fields} fields")
        if self.order > self.groups:
            raise ValueError(f"order: products take fields of different groups, of which there are {self.groups}; got {self.order}")
        if (self.history == 0) and self.shares.sequence > 0:
            raise ValueError(f"shares.sequence: is {self.shares.sequence:g}, but there is no history (history is 0)")
        return self


@dataclass(frozen=True)
class Rows:
    """B impressions.

    Attributes:
        values: int64 ``[B, fields]``, from 0.
        dense: float32 ``[B, dense]``.
        candidate: int64 ``[B]``; empty where there is no history.
        events: int64 ``[B, history]``, newest first, so that column i is i events old; from ``lengths`` on, without meaning.
        lengths: int64 ``[B]``.
        labels: float32 ``[B]``.
        parts: float64 ``[B, 6]``, the parts of the logit in the order of `PARTS`; they sum to the logit less its bias.
    """

    values: np.ndarray
    dense: np.ndarray
    candidate: np.ndarray
    events: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    parts: np.ndarray

    def __getitem__(self, chosen: slice | np.ndarray) -> "Rows":
        return Rows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @classmethod
    def concatenate(cls, pieces: list["Rows"]) -> "Rows":
        """One after another."""
        return cls(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in cls.__dataclass_fields__))


class Planted:
    """The hidden parameters, and the source of rows.

    Args:
        config: see `Impressions`.

    Attributes:
        cardinalities: int ``[fields]``.
        groups: the fields of each group.
        frequencies: the exact distribution of each field's values.
    """

    def __init__(self, config: Impressions) -> None:
        self.config = config
        random = np.random.default_rng([config.seed, 0])
        self.cardinalities = np.geomspace(*config.cardinality, config.fields).round().astype(int)
        random.shuffle(self.cardinalities)
        self.groups = [tuple(int(f) for f in part) for part in np.array_split(np.arange(config.fields), config.groups)]
        counts = [_slots(int(n), config.zipf) for n in self.cardinalities]
        self.frequencies = [count / _SLOTS for count in counts]
        self._tables = [np.repeat(np.arange(len(count), dtype=np.int64), count) for count in counts]
        self._factors = [_whitened(_draw(random, len(p), config.latent, config.factors), p) for p in self.frequencies]
        self._plant_main(random)
        self._pairs = _subsets(random, self.groups, 2, config.pairs)
        self._products = _subsets(random, self.groups, config.order, config.products)
        self._plant_waves(random)
        self._plant_items(random)
        self._group_pairs = _subsets(random, [(g,) for g in range(config.groups)], 2, config.group_pairs)
        self._scale = config.logit_std * np.sqrt(config.shares.as_array())

    def rows(self, start: int, count: int) -> Rows:
        """Rows ``start`` to ``start + count - 1``; a row is the same whatever is drawn with it."""
        if start < 0 or count < 1:
            raise ValueError(f"rows: expected start >= 0 and count >= 1, got {start} and {count}")
        first, last = start // BLOCK, (start + count - 1) // BLOCK
        blocks = [self.block(number) for number in range(first, last + 1)]
        rows = blocks[0] if len(blocks) == 1 else Rows.concatenate(blocks)
        return rows[start - first * BLOCK : start - first * BLOCK + count]

    def block(self, number: int) -> Rows:
        """Rows ``number · 4096`` to ``number · 4096 + 4095``."""
        config = self.config
        random = np.random.Generator(np.random.SFC64([config.seed, 1, number]))
        slots = random.integers(0, _SLOTS, (config.fields, BLOCK), dtype=np.uint16)
        values = np.stack([table[slot] for table, slot in zip(self._tables, slots, strict=True)])
        dense = random.standard_normal((BLOCK, config.dense), dtype=np.float32)
        has = 1 if config.history else 0
        candidate = self._item_table[random.integers(0, _SLOTS, BLOCK * has, dtype=np.uint16)]
        events = self._item_table[random.integers(0, _SLOTS, (BLOCK, config.history), dtype=np.uint16)]
        lengths = random.integers(0, config.history + 1, BLOCK)
        if not has:
            candidate = np.zeros(BLOCK, np.int64)
        parts = self._parts(values, dense, candidate, events, lengths) * self._scale
        labels = (random.random(BLOCK) < sigmoid(config.bias + parts.sum(axis=1))).astype(np.float32)
        return Rows(values.T, dense, candidate, events, lengths, labels, parts)

    def probabilities(self, rows: Rows) -> np.ndarray:
        """The true probability of a positive label: float64 ``[B]``."""
        return sigmoid(self.config.bias + rows.parts.sum(axis=1))

    def blocks(self, start: int, count: int, size: int = 16 * BLOCK) -> Iterator[Rows]:
        """The same rows as `rows`, at most ``size`` at a time."""
        for first in range(start, start + count, size):
            yield self.rows(first, min(size, start + count - first))

    def _plant_main(self, random: np.random.Generator) -> None:
        config = self.config
        sizes = random.normal(0, 1, config.fields + config.dense + (config.history > 0))
        sizes /= np.linalg.norm(sizes)
        directions = random.normal(0, 1, (config.fields, config.latent))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self._effects = [size * z @ u for size, z, u in zip(sizes, self._factors, directions, strict=False)]
        self._dense_effects = sizes[config.fields : config.fields + config.dense]
        self._item_size = sizes[-1] if config.history else 0.0

    def _plant_waves(self, random: np.random.Generator) -> None:
        """Phases of every value in every wave of its group, the groups' main effects, and their exact variances."""
        self._phases: list[np.ndarray] = [np.empty(0)] * self.config.fields
        self._purged: list[np.ndarray] = [np.empty(0)] * self.config.fields
        self._means, self._variances = [], []
        for group in self.groups:
            width = len(group) * self.config.latent
            for f in group:
                omega = random.normal(0, self.config.frequency / np.sqrt(width), (self.config.latent, _WAVES))
                self._phases[f] = self._factors[f] @ omega + random.uniform(0, 2 * np.pi, _WAVES) / len(group)
            phases, p = [self._phases[f] for f in group], [self.frequencies[f] for f in group]
            turns = [q @ np.exp(1j * phase) for phase, q in zip(phases, p, strict=True)]  # E e^{iθ}: each field's characteristic function
            mean = float(np.prod(turns, axis=0).real.sum())
            explained = 0.0
            for i, f in enumerate(group):
                others = np.prod([turn for j, turn in enumerate(turns) if j != i], axis=0)
                self._purged[f] = (np.exp(1j * phases[i]) * others).real.sum(axis=1) - mean
                explained += float(p[i] @ self._purged[f] ** 2)
            self._means.append(mean)
            self._variances.append(_second_moment(phases, p) - mean**2 - explained)

    def _plant_items(self, random: np.random.Generator) -> None:
        config = self.config
        if not config.history:
            self._item_table, self.item_frequencies = np.zeros(_SLOTS, np.int64), np.ones(1)
            return
        count = _slots(config.items, config.zipf)
        self._item_table = np.repeat(np.arange(config.items), count)
        self.item_frequencies = p = count / _SLOTS
        z = random.normal(0, 1, (config.items, config.latent)) / np.sqrt(config.latent)
        kernel = np.exp(z @ z.T / _TEMPERATURE)
        kernel -= (p @ kernel)[None, :]
        kernel -= (kernel @ p)[:, None]
        self._kernel = kernel / np.sqrt(p @ kernel**2 @ p)
        self._item_effects = self._item_size * _whitened(random.normal(0, 1, (config.items, 1)), p)[:, 0]
        # Row n: the weights of the n newest events, whose squares sum to 1 on average: a share of 1/(L + 1) of the rows has no event.
        weights = np.tril(np.ones((config.history + 1, config.history)), -1) * config.recency ** np.arange(config.history)
        norms = np.linalg.norm(weights, axis=1, keepdims=True)
        share = config.history / (config.history + 1)
        self._weights = np.divide(weights, norms, out=np.zeros_like(weights), where=norms > 0) / np.sqrt(share)

    def _parts(self, values: np.ndarray, dense: np.ndarray, candidate: np.ndarray, events: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The parts, unscaled: ``[B, 6]``; ``values`` is ``[fields, B]``."""
        z = [factors.take(v, axis=0) for factors, v in zip(self._factors, values, strict=True)]
        parts = np.zeros((len(dense), len(PARTS)))
        parts[:, 0] = dense @ self._dense_effects
        for effect, v in zip(self._effects, values, strict=True):
            parts[:, 0] += effect.take(v)
        parts[:, 1] = self._sum_of_products(z, self._pairs)
        parts[:, 2] = self._sum_of_products(z, self._products)
        functions = [self._group_function(group, mean, values) for group, mean in zip(self.groups, self._means, strict=True)]
        parts[:, 3] = sum(functions) / np.sqrt(sum(self._variances))
        for a, b in self._group_pairs:
            norm = np.sqrt(self._variances[a] * self._variances[b] * len(self._group_pairs))
            parts[:, 4] += functions[a] * functions[b] / norm
        if self.config.history:
            parts[:, 0] += self._item_effects[candidate]
            parts[:, 5] = np.einsum("bl,bl->b", self._weights[lengths], self._kernel[candidate[:, None], events])
        return parts

    def _group_function(self, group: tuple[int, ...], mean: float, values: np.ndarray) -> np.ndarray:
        """A group's function less its mean and main effects, ``[B]``."""
        phase = sum(self._phases[f].take(values[f], axis=0) for f in group)
        function: np.ndarray = np.cos(phase).sum(axis=1) - mean
        for f in group:
            function = function - self._purged[f].take(values[f])
        return function

    def _sum_of_products(self, z: list[np.ndarray], subsets: list[tuple[int, ...]]) -> np.ndarray:
        """Factors are white and fields independent, so every product's variance is ``latent``."""
        total = np.zeros(z[0].shape)
        for subset in subsets:
            product = z[subset[0]]
            for f in subset[1:]:
                product = product * z[f]
            total += product
        result: np.ndarray = total.sum(axis=1) / np.sqrt(self.config.latent * len(subsets))
        return result


def sigmoid(x: np.ndarray) -> np.ndarray:
    """``1 / (1 + e^−x)``."""
    result: np.ndarray = 1 / (1 + np.exp(-x))
    return result


def _slots(values: int, zipf: float) -> np.ndarray:
    """How many of the 65536 slots each value holds: at least one, else in proportion to ``rank^−zipf``."""
    weights = 1.0 / np.arange(1, values + 1) ** zipf
    counts = np.maximum(1, np.floor(weights / weights.sum() * _SLOTS)).astype(np.int64)
    counts[0] += _SLOTS - counts.sum()
    return np.asarray(counts)


def _draw(random: np.random.Generator, values: int, latent: int, kind: str) -> np.ndarray:
    """Factors before whitening; signs are drawn anew until no factor is a combination of others."""
    z = random.normal(0, 1, (values, latent))
    while kind == "sign" and np.linalg.matrix_rank(np.sign(z) - np.sign(z).mean(axis=0)) < latent:
        z = random.normal(0, 1, (values, latent))
    return np.asarray(np.sign(z) if kind == "sign" else z)


def _whitened(z: np.ndarray, p: np.ndarray) -> np.ndarray:
    """``z`` with mean 0 and covariance I under the distribution ``p``, nearest to ``z`` (ZCA)."""
    z = z - p @ z
    variances, vectors = np.linalg.eigh((z * p[:, None]).T @ z)
    white: np.ndarray = z @ (vectors / np.sqrt(np.maximum(variances, 1e-9))) @ vectors.T
    return white


def _subsets(random: np.random.Generator, groups: list[tuple[int, ...]], size: int, count: int) -> list[tuple[int, ...]]:
    """Different sets of ``size`` fields, each field of another group; fewer than ``count`` where there are not as many."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(50 * count):
        chosen = random.choice(len(groups), size, replace=False)
        found[tuple(sorted(int(random.choice(groups[g])) for g in chosen))] = None
        if len(found) == count:
            break
    return list(found)


def _second_moment(phases: list[np.ndarray], p: list[np.ndarray]) -> float:
    """``E (Σ_j cos Θ_j)²`` for ``Θ_j = Σ_f θ_jf``, with ``cos a cos b = ½ (cos(a − b) + cos(a + b))`` and independent fields."""
    total = 0.0
    for sign in (1.0, -1.0):
        turns = [np.einsum("v,vj,vl->jl", q, np.exp(1j * x), np.exp(1j * sign * x)) for x, q in zip(phases, p, strict=True)]
        total += 0.5 * float(np.prod(turns, axis=0).real.sum())
    return total
