# SPDX-License-Identifier: Apache-2.0
"""The decision log: every answered request, off the path that answers."""

from dataclasses import replace
from pathlib import Path

from recsys.core.errors import ConfigError
from recsys.core.hashing import is_sampled
from recsys.core.part_log import PartLog
from recsys.decisions.decision import Decision
from recsys.decisions.parts import to_table


class DecisionLog:
    """Writes decisions to a folder as Parquet parts, from a thread of its own; whoever offers one never waits.

    What was shown is written of every decision; its evidence (features and all candidates) of a share of them, chosen by a hash of the
    request id, so that every process and every later reader agrees on which. Decisions that find no room are dropped and counted, as are
    those whose part could not be written.

    Args:
        folder: where the parts go; it is made.
        share: of the requests whose evidence is kept, between 0 and 1.
        capacity: how many decisions may wait to be written.
        flush_rows: how many waiting decisions make a part.
        flush_seconds: how long a decision waits at most until its part is written.

    Raises:
        ConfigError: ``share`` is not between 0 and 1, or ``capacity`` or ``flush_rows`` is below 1.
    """

    def __init__(
        self, folder: Path, *, share: float = 0.01, capacity: int = 10_000, flush_rows: int = 1_000, flush_seconds: float = 60.0
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"decision log: share: expected a number between 0 and 1, got {share}")
        if min(capacity, flush_rows) < 1:
            raise ConfigError(f"decision log: expected capacity and flush_rows of at least 1, got {capacity} and {flush_rows}")
        self.share = share
        self._log: PartLog[Decision] = PartLog(
            folder, to_table, name="decision log", capacity=capacity, flush_rows=flush_rows, flush_seconds=flush_seconds
        )

    @property
    def written(self) -> int:
        """Decisions in parts."""
        return self._log.written

    @property
    def dropped(self) -> int:
        """Decisions that were offered and are in no part."""
        return self._log.dropped

    def keeps_evidence(self, request_id: str) -> bool:
        """Whether the evidence of a request is written; where it is not, it need not be gathered."""
        return is_sampled(request_id, self.share)

    def offer(self, decision: Decision) -> bool:
        """Take a decision, or drop and count it; returns at once which it was."""
        return self._log.offer(decision if self.keeps_evidence(decision.request_id) else replace(decision, evidence=None))

    def close(self) -> None:
        """Write what waits, and take no more."""
        self._log.close()
