# SPDX-License-Identifier: Apache-2.0
"""The engine: takes requests in on the event loop, computes them in batches on one thread, and follows the champion on another."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from opentelemetry.trace import Span

from recsys.core.deadline import Deadline, RejectReason
from recsys.core.schema import TIME
from recsys.inference.request import InvalidRequest
from serving.engine import ladder, spans
from serving.engine.batch import Batch, Tools
from serving.engine.breaker import Breaker
from serving.engine.candidates import CandidateCaches
from serving.engine.entry import Entry, reserve_of
from serving.engine.explaining import Explainer
from serving.engine.finishing import Finisher
from serving.engine.hook import Hook, OnAnswer
from serving.engine.lanes import Lanes
from serving.engine.loaded import Loaded
from serving.engine.pace import Pace
from serving.engine.queue import Limits, RowQueue
from serving.engine.reading import Reads
from serving.engine.source import Source
from serving.engine.swap import Follower, KeepUp, Slots
from serving.engine.threads import Repeating
from serving.engine.verify import NOBODY
from serving.engine.work import Answer, Rejected, Work
from serving.metrics import Metrics
from serving.settings import Settings
from serving.tracing import Tracing

log = logging.getLogger("serving")

_TOO_LATE = "the deadline came before the request could be begun"


class Engine:
    """See `serving.engine`.

    Args:
        source: which bundle to serve.
        settings: sizes and times.
        on_answer: told of every answer, off the path that serves; what it raises is logged.
        keep_up: gives a bundle with all changes of the catalogue, which is itself where there are none; called every
            ``catalogue_seconds``, and before a bundle goes live.
        lanes: bundles that answer some of the users in the champion's place.
        tracing: makes spans of requests; by default none.

    Attributes:
        metrics: what it counts.
        tracing: see above.
        draining: whether it is about to end: it answers, but wants no more to be sent to it.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        *,
        on_answer: OnAnswer | None = None,
        keep_up: KeepUp | None = None,
        lanes: Lanes | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics = Metrics()
        self.tracing = tracing or Tracing()
        self.draining = False
        self._lanes = lanes
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)
        pace = Pace()
        self._slots = Slots(settings.max_batch_rows, settings.keep_previous_seconds, pace, metrics, keep_up or (lambda loaded: loaded))
        self._keeper = None if keep_up is None else Repeating(self.renew, settings.catalogue_seconds, "catalogue")
        self._follower = Follower(source, self._slots, settings.poll_seconds, settings.retry_seconds)
        # Not on the follower: a registry that hangs, or a bundle that takes long, must not keep the store from being tried again.
        self._upkeep = Repeating(self._tick, settings.poll_seconds, "upkeep")
        limits = Limits(settings.max_batch_rows, settings.most_waiting_rows, settings.max_delay_ms / 1000)
        self._queue = RowQueue(limits, pace)
        self._changed = threading.Condition()
        self._stopped = False
        self._hook = None if on_answer is None else Hook(on_answer, metrics.unlogged.inc)
        self._reads = Reads(settings.read_threads, settings.read_share, self.breaker, self._read_failed)
        self._finisher = Finisher(metrics, self._hook, lambda: self.loaded)
        self._tools = Tools(self._reads, CandidateCaches(settings.cached_candidates), Explainer(), self._finisher, metrics)
        self._thread = threading.Thread(target=self._compute, name="model", daemon=True)

    @property
    def loaded(self) -> Loaded | None:
        """The bundle that answers; None before the first. Read it once and stay with it."""
        return self._slots.loaded

    @property
    def bundles(self) -> tuple[Loaded, ...]:
        """The bundles that are loaded: the one that answers, then the former one while it is kept, and the canary; each once."""
        found: dict[tuple[int, str], Loaded] = {}
        for loaded in (self._slots.loaded, self._slots.former, self.canary):
            if loaded is not None:
                found.setdefault(loaded.key, loaded)
        return tuple(found.values())

    @property
    def canary(self) -> Loaded | None:
        """The bundle that answers some of the users in the champion's place; None while there is none."""
        return None if self._lanes is None else self._lanes.canary

    @property
    def problem(self) -> str | None:
        """Why no bundle is loaded, or why the last swap failed; None where all is well."""
        return self._slots.problem

    @property
    def alive(self) -> bool:
        """Whether the thread that computes runs."""
        return self._thread.is_alive()

    @property
    def not_ready(self) -> str | None:
        """Why no requests should be sent here now; None where they should."""
        if self.loaded is None:
            return self.problem or "no model is loaded"
        if self.draining:
            return "the server is about to end"
        if not self.alive:
            return "the thread that computes has ended"
        if self.settings.ready_needs_store and self.breaker.open:
            return "the feature store does not answer"
        return None

    def start(self) -> None:
        """Begin to load and to compute; returns at once."""
        self._thread.start()
        self._follower.start()
        self._upkeep.start()
        if self._keeper is not None:
            self._keeper.start()
        if self._lanes is not None:
            self._lanes.start()

    def drain(self) -> None:
        """Say from now on that the server is not ready."""
        self.draining = True

    def stop(self) -> None:
        """Answer what waits, and take no more."""
        self._follower.stop()
        self._upkeep.stop()
        if self._keeper is not None:
            self._keeper.stop()
        if self._lanes is not None:
            self._lanes.stop()
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(self.settings.drain_seconds)
        self._tools.explainer.close()
        self._reads.close()
        if self._hook is not None:
            self._hook.close()

    def swap(self, load: Callable[[], Loaded]) -> Loaded:
        """Put another bundle live, see `Slots.swap`. The follower brings back what its source names, if that is another one."""
        return self._slots.swap(load)

    def renew(self) -> None:
        """Apply the changes of the catalogue now: requests that come after this see them. See `Slots.renew`."""
        self._slots.renew()
        if self._lanes is not None:
            self._lanes.renew()

    def feedback(self, request_id: str, user_id: str, item_id: str, values: Mapping[str, Any]) -> None:
        """Tell whoever judges bundles of an event about an item that the list of a request has shown."""
        if self._lanes is not None:
            self._lanes.feedback(request_id, user_id, item_id, values)

    def admit(self, deadline: Deadline) -> None:
        """Refuse a request before it is read, of which no more is known than when it must be answered at the latest.

        Raises:
            Rejected: `answer` would reject it as well, unless it is smaller than all that came of late.
        """
        now = time.monotonic()
        with self._changed:
            self._queue.check(deadline.at - reserve_of(deadline, self.settings.reserve_ms / 1000, now), now)

    async def answer(self, work: Work) -> Answer:
        """Answer a request before its deadline, as well as time and feature store allow. Cancelling the call takes the request back.

        Raises:
            Rejected: it cannot be answered; says for which of the fixed reasons.
        """
        with spans.answering(self.tracing, work) as span:
            entry = self._entered(work, span)
            try:
                outcome: Answer | Rejected = await self._awaited(entry)
            except Rejected as error:
                outcome = error
            if self._lanes is not None:
                self._lanes.ended(work.request_id, entry.loaded, time.monotonic() - entry.arrived, outcome)
                self.metrics.versions.labels(str(entry.loaded.version), "rejected" if isinstance(outcome, Rejected) else "answered").inc()
            spans.ended(self.tracing, entry, outcome)
            if isinstance(outcome, Rejected):
                raise outcome
            return outcome

    async def _awaited(self, entry: Entry) -> Answer:
        """The answer to a request that waits, or what there is when time is nearly over."""
        waiting = asyncio.wrap_future(entry.future)
        try:
            await asyncio.wait({waiting}, timeout=max(0.0, entry.last_call - time.monotonic()))
            if waiting.done() or not entry.claim():
                return await waiting
        except asyncio.CancelledError:
            waiting.cancel()
            if entry.claim():
                self._forget(entry)
            raise
        waiting.cancel()
        self._forget(entry)
        return self._last_call(entry)

    def _entered(self, work: Work, span: Span) -> Entry:
        """The request, waiting."""
        loaded = self.loaded
        if loaded is None:
            raise Rejected(RejectReason.DEPENDENCY, self.problem or "no model is loaded")
        if self._lanes is not None:
            loaded = self._lanes.choose(work.request.user_id, loaded)
        item_rows = None
        if work.item_ids is not None:
            item_rows = loaded.recommender.view.rows(list(work.item_ids))
            if (item_rows < 0).any():
                unknown = work.item_ids[int(item_rows.argmin())]
                raise Rejected(RejectReason.INVALID_INPUT, f"item_ids: {unknown!r} is not in the catalogue")
        try:
            loaded.recommender.check(work.request)
        except InvalidRequest as error:
            raise Rejected(RejectReason.INVALID_INPUT, str(error)) from None
        rows = loaded.recommender.wanted([work.request]) if item_rows is None else len(item_rows)
        entry = Entry(work, loaded, rows, item_rows, self.settings.reserve_ms / 1000, span)
        # Whatever list is given in the end, of the popular one too.
        entry.known.seen = loaded.recommender.excluded(work.request) if item_rows is None else None
        with self._changed:
            if self._stopped:
                raise Rejected(RejectReason.DEPENDENCY, "the server has ended")
            self._queue.offer(entry, time.monotonic())
            self.metrics.queued(len(self._queue), self._queue.rows)
            self._changed.notify()
        return entry

    def _forget(self, entry: Entry) -> None:
        with self._changed:
            self._queue.remove(entry)
            self.metrics.queued(len(self._queue), self._queue.rows)

    def _last_call(self, entry: Entry) -> Answer:
        """What there is when time is nearly over."""
        if entry.started is None:
            raise Rejected(RejectReason.DEADLINE_BEFORE_START, _TOO_LATE)
        if entry.work.deadline.expired:
            raise Rejected(RejectReason.DEADLINE_IN_STAGE, "the deadline came while the request was computed")
        return self._finisher.answered(entry, ladder.best_known(entry, ladder.DEADLINE))

    def _compute(self) -> None:
        while self._step():
            continue

    def _step(self) -> bool:
        """Compute the next batch; False at the end. Nothing of it is held while the next one is waited for."""
        batch = self._next()
        if not batch:
            return batch is not None
        rows, began = sum(entry.rows for entry in batch), time.monotonic()
        self.metrics.batch(len(batch), rows)
        try:
            with spans.batch(self.tracing, batch, rows):
                Batch(batch[0].loaded, batch, self._tools).run()
        except Exception:
            log.exception("a batch of %d requests failed", len(batch))
            self._reject(batch, RejectReason.INTERNAL, "the server failed; its log says why")
        with self._changed:
            self._queue.done(rows, time.monotonic() - began)
        return True

    def _next(self) -> list[Entry] | None:
        """The next batch, which may be empty; None at the end."""
        with self._changed:
            while (due := self._queue.due(time.monotonic())) is None or (due > 0 and not self._stopped):
                if due is None and self._stopped:
                    return None
                self._changed.wait(due)
            now = time.monotonic()
            batch, late = self._queue.take(now)
            self.metrics.queued(len(self._queue), self._queue.rows)
        self._reject(late, RejectReason.DEADLINE_BEFORE_START, _TOO_LATE)
        for entry in batch:
            entry.started = now
            entry.known.intervals.append(("queue", entry.arrived, now))
        return batch

    def _reject(self, entries: Sequence[Entry], reason: RejectReason, message: str) -> None:
        for entry in entries:
            entry.resolve(Rejected(reason, message))

    def _tick(self) -> None:
        """Now and then: let the former bundle go, and try a store that was left alone, whether or not anybody asks for something."""
        self._slots.release()
        loaded = self.loaded
        if loaded is not None and self.breaker.due:
            cutoff = time.monotonic() + self.settings.recommend_deadline_ms / 1000
            now = pa.array([datetime.now(UTC)], TIME)
            read = self._reads.begin(lambda: loaded.recommender.users([NOBODY], now), [cutoff])
            for _ in read.groups():
                continue
        self.metrics.store_open.set(self.breaker.open)

    def _read_failed(self, problem: str) -> None:
        self.metrics.failed("read")
        log.warning("reading features failed: %s", problem)
