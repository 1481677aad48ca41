# SPDX-License-Identifier: Apache-2.0
"""One batch through the stages of the recommendation path: features, retrieve, items, rank, respond.

Before every stage those are let go who have gone, and those whose time is over get the best list that is known for them; no stage begins
for them. A stage that fails costs its requests a rung of the ladder, not their answer.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from recsys.core.schema import TIME
from recsys.inference.recommender import Candidates, Ranked, Users
from serving.engine.candidates import CandidateCaches, key_of, list_of, scored, take_users, together
from serving.engine.entry import Entry
from serving.engine.explaining import Explainer, Explanation
from serving.engine.finishing import Finisher
from serving.engine.ladder import DEADLINE, because, flagged
from serving.engine.loaded import Loaded
from serving.engine.reading import Problem, Reads
from serving.engine.work import CACHED_FEATURES, NO_REASONS, Answer, FeatureAges
from serving.metrics import Metrics

log = logging.getLogger("serving")


@dataclass(frozen=True)
class Tools:
    """What all batches share."""

    reads: Reads
    caches: CandidateCaches
    explainer: Explainer
    finisher: Finisher
    metrics: Metrics


@dataclass(frozen=True)
class Group:
    """Requests of a batch that go on together, with what is known of their users, row by row."""

    entries: list[Entry]
    users: Users


class Batch:
    """See the module.

    Args:
        loaded: the bundle of all entries.
        entries: at least one.
        tools: see `Tools`.
    """

    def __init__(self, loaded: Loaded, entries: Sequence[Entry], tools: Tools) -> None:
        self._loaded, self._recommender, self._tools = loaded, loaded.recommender, tools
        self._entries = list(entries)

    def run(self) -> None:
        """Answer every entry, now or, where it is to be explained, soon."""
        entries = self._in_time(self._entries)
        if not entries:
            return
        users, at = _asked(entries)
        began = time.monotonic()
        read = self._tools.reads.begin(lambda: self._recommender.users(users, at), [entry.cutoff for entry in entries])
        for places, problem in read.groups():
            some = [entries[place] for place in places]
            _note(some, "features", began)
            if problem is None:
                self._go_on(Group(some, take_users(self._recommender, read.result, places)))
            else:
                self._remember(some, problem)

    def _remember(self, entries: Sequence[Entry], problem: Problem) -> None:
        """Go on with the last features of those whose features are remembered."""
        memory, known = self._loaded.memory, []
        for entry in self._in_time(entries):
            age = memory.age(entry.work.request.user_id)
            if age is None:
                self._tools.finisher.fall_back(entry, f"features: {problem}")
            else:
                entry.known.ages, entry.known.why = FeatureAges(cached=age), (f"features: {problem}",)
                known.append(entry)
        with self._rung("features", known):
            if known:
                self._go_on(Group(known, self._loaded.remembered.users(*_asked(known))))

    def _go_on(self, group: Group) -> None:
        requests = [entry.work.request for entry in group.entries]
        group = Group(group.entries, self._recommender.excluding(group.users, requests))
        for b, entry in enumerate(group.entries):
            history = list_of(group.users.history, b)
            entry.known.seen, entry.known.new_user = list_of(group.users.seen, b), len(history) == 0
            entry.known.ages = replace(entry.known.ages, newest_event=self._newest(group.users, b, entry))
        self._retrieve(group)
        for entry in group.entries:
            if entry.known.candidates is None:
                self._tools.finisher.fall_back(entry, "retrieve: failed")
        group = self._left(group)
        if group.entries:
            self._rank(group)

    def _newest(self, users: Users, b: int, entry: Entry) -> float | None:
        values = [users.table.column(name)[b].as_py() for name in self._loaded.ages]
        present = [value for value in values if value is not None]
        return min(present) + (entry.known.ages.cached or 0.0) if present else None

    def _retrieve(self, group: Group) -> None:
        """Find the candidates of every request; those of one that fails stay unknown."""
        missing: dict[int | None, list[int]] = defaultdict(list)
        keys = {b: key_of(entry, group.users, b) for b, entry in enumerate(group.entries) if entry.item_rows is None}
        cache = self._tools.caches.of(self._loaded)
        for b, entry in enumerate(group.entries):
            if b in keys:
                entry.known.candidates = cache.get(keys[b])
                self._tools.metrics.cached("candidates", hit=entry.known.candidates is not None)
            if entry.known.candidates is None:
                # Lists of different lengths are not the beginnings of each other for every index.
                missing[None if entry.item_rows is not None else entry.rows].append(b)
        for count, places in missing.items():
            part = self._left(group, places)
            with self._rung("retrieve", part.entries), _timed(part.entries, "retrieve"):
                if not part.entries:
                    continue
                for entry, found in zip(part.entries, self._find(part, count), strict=True):
                    entry.known.candidates = found
        for b, key in keys.items():
            if (kept := group.entries[b].known.candidates) is not None:
                cache.put(key, kept)

    def _find(self, group: Group, count: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
        if count is None:
            rows = [entry.item_rows for entry in group.entries if entry.item_rows is not None]
            return scored(self._recommender, group.users, rows)
        found = self._recommender.retrieve(group.users, count)
        return [(found.rows[b].copy(), found.log_probability[b].copy()) for b in range(len(group.entries))]

    def _rank(self, group: Group) -> None:
        candidates = together(entry.known.candidates for entry in group.entries if entry.known.candidates is not None)
        users, began = group.users, time.monotonic()
        read = self._tools.reads.begin(lambda: self._recommender.items(users, candidates), [entry.cutoff for entry in group.entries])
        for places, problem in read.groups():
            some = [group.entries[place] for place in places]
            _note(some, "items", began)
            if problem is None:
                chosen = [place for place in places if self._is_in_time(group.entries[place])]
                self._score(group, chosen, *_narrowed(candidates, read.result, chosen))
            for entry in some if problem is not None else ():
                self._tools.finisher.fall_back(entry, f"items: {problem}")

    def _score(self, group: Group, places: Sequence[int], candidates: Candidates, items: pa.Table) -> None:
        """Rank the candidates of some requests of a group, and answer them."""
        entries = [group.entries[place] for place in places]
        if not entries:
            return
        with self._rung("rank", entries):
            users = take_users(self._recommender, group.users, places)
            with _timed(entries, "rank"):
                ranked = self._recommender.rank(users, candidates, items)
            for b, entry in enumerate(entries):
                if self._is_in_time(entry):
                    self._respond(entry, b, users, ranked)

    def _respond(self, entry: Entry, b: int, users: Users, ranked: Ranked) -> None:
        if not np.isfinite(ranked.score[b]).any() and (ranked.candidates.rows[b] >= 0).any():
            self._tools.metrics.failed("rank")
            self._tools.finisher.fall_back(entry, "rank: failed")
            return
        request, finisher = entry.work.request, self._tools.finisher
        trace = finisher.trace(entry, users, ranked, b)
        began = time.monotonic()
        response = self._recommender.respond(replace(request, explain=False), b, users, ranked)
        _note([entry], "respond", began)
        answer = self._answer(entry, Answer(response, self._loaded, {}))
        if not request.explain:
            finisher.answer(entry, answer, trace)
            return
        entry.known.answer = answer

        def explained() -> None:
            with self._rung("explain", [entry]):
                with _timed([entry], "explain"):
                    response = self._recommender.respond(request, b, users, ranked)
                finisher.answer(entry, self._answer(entry, Answer(response, self._loaded, {})), trace)

        plain = flagged(because(answer, "explain: too slow"), NO_REASONS)
        self._tools.explainer.offer(Explanation(entry, explained, lambda: finisher.answer(entry, plain, trace)))

    def _answer(self, entry: Entry, answer: Answer) -> Answer:
        whole = replace(answer, stages=entry.known.stages, ages=entry.known.ages, why=entry.known.why)
        return whole if entry.known.ages.cached is None else flagged(whole, CACHED_FEATURES)

    def _is_in_time(self, entry: Entry) -> bool:
        """Whether a stage may begin for a request; else it gets the best list that is known, unless it was answered."""
        if entry.gone:
            return False
        if time.monotonic() >= entry.cutoff:
            self._tools.finisher.fall_back(entry, DEADLINE)
            return False
        return True

    def _in_time(self, entries: Sequence[Entry]) -> list[Entry]:
        return [entry for entry in entries if self._is_in_time(entry)]

    def _left(self, group: Group, places: Sequence[int] | None = None) -> Group:
        """Of a group, or some places in it, those that a stage may begin for."""
        places = range(len(group.entries)) if places is None else places
        kept = [place for place in places if self._is_in_time(group.entries[place])]
        return Group([group.entries[place] for place in kept], take_users(self._recommender, group.users, kept) if kept else group.users)

    @contextmanager
    def _rung(self, stage: str, entries: Sequence[Entry]) -> Iterator[None]:
        """Whatever fails inside costs these requests the stage; they get the best list that is known without it."""
        try:
            yield
        except Exception:
            log.exception("stage %s failed for %d requests", stage, len(entries))
            self._tools.metrics.failed(stage)
            for entry in entries:
                self._tools.finisher.fall_back(entry, f"{stage}: failed")


def _asked(entries: Sequence[Entry]) -> tuple[list[str], pa.Array]:
    requests = [entry.work.request for entry in entries]
    return [request.user_id for request in requests], pa.array([request.at for request in requests], TIME)


def _narrowed(candidates: Candidates, items: pa.Table, places: Sequence[int]) -> tuple[Candidates, pa.Table]:
    """The candidates of some requests and their item features."""
    if len(places) == len(candidates.rows):
        return candidates, items
    chosen = np.asarray(places, np.int64)
    owner = np.nonzero(candidates.rows >= 0)[0]
    return Candidates(candidates.rows[chosen], candidates.log_probability[chosen]), items.filter(pa.array(np.isin(owner, chosen)))


def _note(entries: Sequence[Entry], stage: str, began: float) -> None:
    """A stage that began then has ended."""
    interval = (stage, began, time.monotonic())
    for entry in entries:
        entry.known.intervals.append(interval)


@contextmanager
def _timed(entries: Sequence[Entry], stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    _note(entries, stage, began)
