# SPDX-License-Identifier: Apache-2.0
"""How much does our server answer in time beside BentoML, LitServe, Ray Serve and a bare FastAPI, and what do swaps cost?

**Load.** Requests for the scores of 500 items for a user come at times of a Poisson process drawn beforehand, whatever the server does, and
a latency counts from when its request was due. All processes of a server share one core; the generator, with encoded requests, has another.
Bodies and answers are JSON for all. Goodput is what is answered a second with status 200, by the ranker, within the deadline (100 and
50 ms); clients give up after two seconds. The capacity of each server, over which its rates are, is that of a closed loop with 8 clients.

**Rows.** In ``same_ranker`` the same work stands behind every server: the same features from the same online store, the same compiled
ranker, the same batch code; ours is asked by the Open Inference Protocol. In ``full_path`` ours is asked by ``/v1/rank``, and behind the
peers stands the ranker in eager PyTorch over one row for each candidate, as a ranker is commonly served. Peers batch as their
documentation has it, where they do. All give the same scores, which is looked at first.

**Checks.** A ratio is ours over the best peer's, each at the rate of its own highest goodput (its knee), measured in turns; the smaller
of both deadlines counts. While bundles are swapped the deadline is one that no request of a steady load misses: of 100 ms a burst that
comes by chance costs some requests theirs, whether a bundle is loaded or not. Our server alone is told the deadline: the others have no
word for it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.frame import Result


def run(*, quick: bool) -> "Result":
    """Run the benchmark."""
    from benchmarks.serving.contest import run  # not above: the generator and the servers, which are parts of this package, need none of it

    return run(quick=quick)
