# SPDX-License-Identifier: Apache-2.0
"""The engine behind the routes.

What a route needs of it:

- ``engine.loaded``: the bundle that answers (`Loaded`), None before the first. It may be another one a moment later, so read it once and
  stay with it: ``loaded.recommender``, ``loaded.titles``, ``loaded.popular``, and who it is (``name``, ``version``, ``sha256``,
  ``features``).
- ``await engine.answer(Work(...)) -> Answer``: one list, batched with those of other requests, before its deadline; or `Rejected`, whose
  ``reason`` is one of the fixed set and whose ``status`` is its HTTP status. Cancelling the call takes the request back.
- ``engine.swap(load) -> Loaded``: load a bundle off the event loop, warm it, verify it, put it live; where that fails, the old one stays.
  The engine does so itself when its `Source` names another bundle.
- ``engine.metrics``, ``engine.settings``, ``engine.not_ready``, ``engine.problem``, ``engine.draining``, ``engine.alive``.
- ``Engine(source, settings, on_answer=...)``: a function that is told of every answer (`Served`) on a thread of its own.

How a request goes: `Engine.answer` makes an `Entry` for the bundle that is live and offers it to the `RowQueue`, which rejects what could
not be in time. The thread ``model`` takes a batch of one bundle and runs it through the stages (`Batch`). Features are read on threads of
their own (`Reads`), for as long as each request can wait; a `Breaker` leaves a dead store alone. Reasons are found on the thread
``explain``. What goes wrong or takes too long costs a rung of the ladder (`serving.engine.ladder`); shortly before the deadline
`Engine.answer` itself gives the best list that is known. The thread ``follower`` asks the source which bundle ought to answer, and swaps
(`Slots`).

A queue keeps to one bundle in a batch, whichever bundles its entries have, so that further lanes beside the champion need no queue of
their own.
"""

from serving.engine.engine import Engine
from serving.engine.loaded import Loaded
from serving.engine.source import Hosting, RegistrySource, Source, Target
from serving.engine.work import FLAGS, Answer, FeatureAges, Rejected, Served, Work

__all__ = [
    "FLAGS",
    "Answer",
    "Engine",
    "FeatureAges",
    "Hosting",
    "Loaded",
    "RegistrySource",
    "Rejected",
    "Served",
    "Source",
    "Target",
    "Work",
]
