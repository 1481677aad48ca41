# SPDX-License-Identifier: Apache-2.0
"""Steps that depend on each other, each keyed by what it is made of: what is there already is not made again.

Nothing here knows what the steps do.
"""

from pipelines.graph.plan import Graph
from pipelines.graph.runner import Outcome, Runner, run
from pipelines.graph.status import State, Status, status
from pipelines.graph.step import Context, Step, StepError
from pipelines.graph.store import Record, Result, Store

__all__ = ["Context", "Graph", "Outcome", "Record", "Result", "Runner", "State", "Status", "Step", "StepError", "Store", "run", "status"]
