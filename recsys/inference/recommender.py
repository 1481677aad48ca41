# SPDX-License-Identifier: Apache-2.0
"""The one path from a request to a list: retrieve → features → rank → rules → explain. No I/O of its own, and no threads.

Evaluation, gates, parity checks and the server all call it; they differ in the `FeatureReader` that they hand in.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys.bundle.bundle import Bundle
from recsys.bundle.rules import NO_RULES
from recsys.core.schema import TIME
from recsys.data.batch import SequenceBatch, TiledBatch
from recsys.data.jagged import Jagged
from recsys.inference import frame, rules
from recsys.inference.explain import explain
from recsys.inference.features import FeatureReader
from recsys.inference.likeness import Likeness
from recsys.inference.parity import LIST, Parity, Predicts, compare
from recsys.inference.request import InvalidRequest, Request, Response, Scored

# Of a list's length: how many candidates rules choose from, where the bundle's own number is less.
_TO_CHOOSE_FROM = 4


@dataclass(frozen=True)
class Users:
    """What is known of B requests once the feature store has answered.

    Attributes:
        table: B rows of user features.
        history: catalogue rows of the last events, oldest first.
        seen: catalogue rows not to be recommended again.
    """

    table: pa.Table
    history: Jagged
    seen: Jagged


@dataclass(frozen=True)
class Candidates:
    """C candidates for each of B requests; a row of -1 is a place that no item fills.

    Attributes:
        rows: int64 ``[B, C]`` catalogue rows.
        log_probability: float32 ``[B, C]``, the retriever's, over the live catalogue.
    """

    rows: np.ndarray
    log_probability: np.ndarray


@dataclass(frozen=True)
class Ranked:
    """Candidates with the ranker's opinion, calibrated: float32 ``[B, C]`` each, -inf and 0 where there is no item.

    Attributes:
        items: the item features that the ranker read, see `Recommender.items`.
        item_of_row: int64, which row of them belongs to each candidate that is there; None where they stand in the same order.
    """

    candidates: Candidates
    items: pa.Table
    probability: np.ndarray
    score: np.ndarray
    item_of_row: np.ndarray | None = None

    def items_of(self, b: int, places: np.ndarray) -> pa.Table:
        """The item features of some candidates of request ``b``, given by their places in its list; each is there."""
        present = self.candidates.rows >= 0
        row = np.cumsum(present).reshape(present.shape)[b, places] - 1
        return self.items.take(pa.array(row if self.item_of_row is None else self.item_of_row[row]))


class Recommender:
    """Answers requests with one bundle.

    Args:
        bundle: the models, verified and loaded.
        features: where feature values come from, online or as of a point in time.
    """

    def __init__(self, bundle: Bundle, features: FeatureReader) -> None:
        self.bundle = bundle
        self.features = features
        self.view = bundle.catalogue.snapshot()
        self.scorable = bundle.retriever.scorable.numpy()
        self.ranker: Predicts = bundle.ranker
        self._task = bundle.encoder.spec.tasks.index(bundle.settings.task)

    @cached_property
    def likeness(self) -> Likeness:
        """The items, compared; what that needs is computed when it is first asked for."""
        return Likeness(self.bundle, self.view)

    def recommend(self, requests: Sequence[Request]) -> list[Response]:
        """The best live unseen items for each request, all computed in one batch."""
        users = self.users([r.user_id for r in requests], pa.array([r.at for r in requests], TIME))
        users = self.excluding(users, requests)
        ranked = self.rank(users, self.retrieve(users, self.wanted(requests)))
        return [self.respond(request, b, users, ranked) for b, request in enumerate(requests)]

    def wanted(self, requests: Sequence[Request]) -> int:
        """How many candidates are retrieved for each of some requests; more than are shown where rules choose among them."""
        most = max(r.k * (_TO_CHOOSE_FROM if r.rules.over(self.bundle.settings.rules).choose else 1) for r in requests)
        return max(most, self.bundle.settings.candidates)

    def excluded(self, request: Request) -> np.ndarray:
        """int64: the catalogue rows that the rules of a request exclude."""
        rows = self.view.rows(list(request.rules.over(self.bundle.settings.rules).exclude))
        found: np.ndarray = rows[rows >= 0]
        return found

    def excluding(self, users: Users, requests: Sequence[Request]) -> Users:
        """The users of B requests, to whom what the requests' rules exclude is as if they had seen it."""
        excluded = [self.excluded(request) for request in requests]
        if not any(map(len, excluded)):
            return users
        seen = users.seen
        lists = [np.concatenate([seen.values[seen.offsets[b] : seen.offsets[b + 1]], more]) for b, more in enumerate(excluded)]
        return replace(users, seen=Jagged(np.concatenate(lists), np.concatenate([[0], np.cumsum([len(own) for own in lists])])))

    def choose(self, request: Request, score: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The places of at most ``request.k`` of one list's candidates, best first, as the rules have it: quotas, then diversity.

        Args:
            request: whose list it is.
            score: float ``[C]``; what is not finite is not shown.
            rows: int64 ``[C]`` catalogue rows.

        Raises:
            InvalidRequest: a quota's attribute is none of the items'.
        """
        chosen = request.rules.over(self.bundle.settings.rules)
        if not chosen.choose:
            return rules.top(score, rows, request.k)
        order = rules.top(score, rows, len(rows))
        if chosen.quotas:
            order = rules.within_quotas(order, [self._values(quota.attribute, rows) for quota in chosen.quotas], chosen.quotas)
        return rules.diverse(order, score, lambda places: self.likeness.vectors[rows[places]], request.k, chosen.diversity or 0.0)

    def check(self, request: Request) -> None:
        """Hold that this bundle can keep to a request's rules.

        Raises:
            InvalidRequest: a quota's attribute is none of the items'.
        """
        for quota in request.rules.quotas or ():
            self.likeness.values(quota.attribute, np.empty(0, np.int64))

    def rank_items(self, request: Request, item_ids: Sequence[str]) -> Response:
        """The given items in the order of their scores; ``request.k`` cuts the list.

        Raises:
            InvalidRequest: an item is not in the catalogue.
        """
        rows = self.view.rows(list(item_ids))
        if (rows < 0).any():
            raise InvalidRequest(f"item_ids: {item_ids[int(np.argmin(rows))]!r} is not in the catalogue")
        users = self.users([request.user_id], pa.array([request.at], TIME))
        ranked = self.rank(users, self.score(users, rows[None, :]))
        return self.respond(replace(request, rules=NO_RULES), 0, users, ranked)

    def users(self, user_ids: Sequence[str] | pa.Array, at: pa.Array) -> Users:
        """Read the users' features, as known at ``at``."""
        ids = pa.array(user_ids, pa.string())
        seen = frame.read_seen(self.features, ids, at)
        users = self.users_from(frame.read_users(self.features, ids, at))
        return replace(users, seen=self._rows_of(seen, self.bundle.settings.seen_feature))

    def users_from(self, table: pa.Table) -> Users:
        """Users from a table of user features that has been read already; nothing is excluded for them."""
        nothing = Jagged(np.empty(0, np.int64), np.zeros(table.num_rows + 1, np.int64))
        return Users(table, self._rows_of(table, self.bundle.settings.history_feature), nothing)

    @torch.inference_mode()
    def retrieve(self, users: Users, count: int) -> Candidates:
        """The ``count`` live unseen items that the retriever finds most probable."""
        state = self.bundle.retriever.encode(self._sequences(users))
        rows, scores = self.bundle.index.search(state, count, self.view, exclude=users.seen, scorable=self.scorable)
        partition = self.bundle.index.log_partition(state, self.view, scorable=self.scorable)
        return Candidates(rows, scores - partition[:, None])

    @torch.inference_mode()
    def score(self, users: Users, rows: np.ndarray) -> Candidates:
        """The retriever's log-probability of given catalogue rows ``[B, C]``."""
        state = self.bundle.retriever.encode(self._sequences(users))
        partition = self.bundle.index.log_partition(state, self.view, scorable=self.scorable)
        return Candidates(rows, self.bundle.index.score(state, rows) - partition[:, None])

    def items(self, users: Users, candidates: Candidates) -> pa.Table:
        """The item features of all candidates that are there, one request after another, each as known at its request's time."""
        present = candidates.rows >= 0
        at = users.table.column("request_time").take(pa.array(np.nonzero(present)[0]))
        return frame.read_items(self.features, self.view.take(candidates.rows[present]), at)

    @torch.inference_mode()
    def rank(self, users: Users, candidates: Candidates, items: pa.Table | None = None, item_of_row: np.ndarray | None = None) -> Ranked:
        """Score the candidates with the ranker and combine both opinions (`rules.combine`).

        Args:
            users: B requests.
            candidates: of each.
            items: what `items` gave for them; it is read where it is not given.
            item_of_row: int64, which row of ``items`` belongs to each candidate that is there; None where they stand in the same order.
        """
        items = self.items(users, candidates) if items is None else items
        present = candidates.rows >= 0
        probability = np.zeros(candidates.rows.shape, np.float32)
        if present.any():
            batch = self.batch(users, candidates, items, item_of_row)
            predicted: Tensor = self.ranker.predict(batch)[:, self._task]
            groups = self._groups(users, candidates, items, item_of_row)
            probability[present] = self.bundle.calibration.apply(predicted.numpy(), groups)
        score = rules.combine(candidates.log_probability, probability, self.bundle.settings.rank_weight)
        return Ranked(candidates, items, probability, np.where(present, score, -np.inf).astype(np.float32), item_of_row)

    def batch(self, users: Users, candidates: Candidates, items: pa.Table, item_of_row: np.ndarray | None = None) -> TiledBatch:
        """What the ranker reads of all candidates that are there, of which there is one at least; see `rank`."""
        return self.bundle.encoder.tiled(users.table, np.nonzero(candidates.rows >= 0)[0], items, item_of_row).batch()

    @torch.inference_mode()
    def adopt(self, ranker: Predicts, users: Users) -> Parity:
        """Let another form of the bundle's ranker answer from now on, if it agrees with the bundle's own (`Parity.holds`).

        Args:
            ranker: such as `recsys.inference.compiled.compile_ranker` gives.
            users: whose candidates are ranked by both, to compare them.
        """
        found = self.compared(ranker, users)
        if found.holds:
            self.ranker = ranker
        return found

    @torch.inference_mode()
    def compared(self, ranker: Predicts, users: Users) -> Parity:
        """How far another form of the bundle's ranker agrees with the bundle's own, on the candidates of some users."""
        candidates = self.retrieve(users, max(self.bundle.settings.candidates, 2 * LIST))
        present = candidates.rows >= 0
        if not present.any():
            return Parity(rows=0)
        return compare(self.bundle.ranker, ranker, self.batch(users, candidates, self.items(users, candidates)), self._task)

    def respond(self, request: Request, b: int, users: Users, ranked: Ranked) -> Response:
        """The answer to request ``b``: the best of its candidates, with reasons where they are asked for."""
        order = self.choose(request, ranked.score[b], ranked.candidates.rows[b])
        rows = ranked.candidates.rows[b][order]
        reasons = explain(self, users, b, rows, ranked.items_of(b, order)) if request.explain else [()] * len(rows)
        items = tuple(
            Scored(
                item_id=item_id,
                score=float(ranked.score[b, place]),
                log_probability=float(ranked.candidates.log_probability[b, place]),
                probability=float(ranked.probability[b, place]),
                reasons=why,
            )
            for item_id, place, why in zip(self.view.take(rows).to_pylist(), order, reasons, strict=True)
        )
        flags = (("new_user",) if _length(users.history, b) == 0 else ()) + (("short_list",) if len(items) < request.k else ())
        return Response(request.user_id, items, self.bundle.manifest.sha256, flags)

    def _values(self, attribute: str, rows: np.ndarray) -> list[tuple[Hashable, ...]]:
        """The values of an item attribute by place; of a place that no item fills, none."""
        values = self.likeness.values(attribute, np.maximum(rows, 0))
        return [value if row >= 0 else () for value, row in zip(values, rows.tolist(), strict=True)]

    def _groups(self, users: Users, candidates: Candidates, items: pa.Table, item_of_row: np.ndarray | None) -> pa.ChunkedArray | None:
        """The values by which the calibration tells the candidates that are there apart; None where it does not."""
        column = self.bundle.calibration.column
        if column is None:
            return None
        if column in users.table.column_names:
            return users.table.column(column).take(pa.array(np.nonzero(candidates.rows >= 0)[0]))
        values = items.column(column)
        return values if item_of_row is None else values.take(pa.array(item_of_row))

    def _rows_of(self, table: pa.Table, column: str) -> Jagged:
        """The catalogue rows of a column of id lists; unknown ids are left out, a null is an empty list."""
        lists = table.column(column).combine_chunks()
        lengths = np.asarray(lists.value_lengths().fill_null(0), np.int64)
        rows = self.view.rows(lists.flatten())
        owner = np.repeat(np.arange(len(lengths)), lengths)[rows >= 0]
        counts = np.bincount(owner, minlength=len(lengths))
        return Jagged(rows[rows >= 0], np.concatenate([[0], np.cumsum(counts)]))

    def _sequences(self, users: Users) -> SequenceBatch:
        return SequenceBatch(items=torch.from_numpy(users.history.values), offsets=torch.from_numpy(users.history.offsets))


def _length(jagged: Jagged, b: int) -> int:
    return int(jagged.offsets[b + 1] - jagged.offsets[b])
