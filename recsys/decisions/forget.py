# SPDX-License-Identifier: Apache-2.0
"""Taking a user out of a decision log and out of the impressions that were made of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.core.files import exclusive
from recsys.core.part_log import drop_rows, part_files, remove_leftovers
from recsys.core.schema import USER
from recsys.decisions.feedback import APART_FILE, EVENTS_FILE, IMPRESSIONS_FILE, PENDING_FILE, increments, read_columns
from recsys.decisions.impressions import REQUEST
from recsys.decisions.parts import read_decisions_part


def forget_impressions(out: Path, decisions: Path | None, user_id: str) -> int:
    """Take a user out of the output of the feedback job: impressions, and the feedback to the user's requests; how many rows went.

    Call it before `forget_decisions`: feedback that waits names a request, and only the decision says whose that was.

    Args:
        out: the folder of the increments.
        decisions: the folder of the decision log, where there is one.
        user_id: the user.

    Raises:
        DataError: a run of the job is at work on ``out``, or a file is damaged.
    """
    with exclusive(out, f"{out}: a run is joining feedback at this moment; forget again once it has ended"):
        remove_leftovers(out)
        requests = set[str]() if decisions is None else _requests(decisions, user_id)
        for increment in increments(out):
            mine = read_columns(increment / IMPRESSIONS_FILE, (USER, REQUEST)).filter(pc.field(USER) == user_id)
            requests |= set(mine.column(REQUEST).to_pylist())
        to_requests = _where(REQUEST, requests)
        gone = 0
        for increment in increments(out):
            gone += drop_rows(increment / IMPRESSIONS_FILE, _where(USER, {user_id}))
            gone += sum(drop_rows(increment / name, to_requests) for name in (EVENTS_FILE, APART_FILE))
            if (increment / PENDING_FILE).is_file():
                gone += drop_rows(increment / PENDING_FILE, to_requests)
        return gone


def forget_decisions(folder: Path, user_id: str) -> int:
    """Take a user's decisions out of the parts of a log; how many there were. What a server has yet to write comes later: call it again.

    Raises:
        DataError: a part is damaged; it is named before any other is rewritten.
    """
    _requests(folder, user_id)
    remove_leftovers(folder)
    return sum(drop_rows(path, _where(USER, {user_id})) for path in part_files(folder))


def _requests(folder: Path, user_id: str) -> set[str]:
    found: set[str] = set()
    for path in part_files(folder):
        part = read_decisions_part(path, ("request_id", "user_id"))
        found |= set(part.filter(pc.field("user_id") == user_id).column("request_id").to_pylist())
    return found


def _where(column: str, values: set[str]) -> Callable[[pa.Table], np.ndarray]:
    """The rows of a table whose ``column`` holds one of some values."""
    wanted = pa.array(sorted(values), pa.string())
    return lambda table: np.asarray(pc.is_in(table.column(column), value_set=wanted), bool)
