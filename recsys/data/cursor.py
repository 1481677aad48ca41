# SPDX-License-Identifier: Apache-2.0
"""Where in its epoch a loader stands, so that a run which was stopped goes on with the very next sample."""

from collections.abc import Mapping

from recsys.core.errors import CheckpointError


class Resumable:
    """The cursor of a loader: the epoch, and how many of its ``total`` samples were handed out.

    Counting samples, it does not depend on the batch size.

    Args:
        total: samples in an epoch.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._epoch = 0
        self._samples = 0
        self._resume = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and with it the order. The cursor goes back to 0 unless this is the current epoch already."""
        if epoch != self._epoch:
            self._epoch, self._samples, self._resume = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """``{"epoch", "samples"}``: the samples of the epoch handed out so far (not those prepared ahead)."""
        return {"epoch": self._epoch, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved cursor: the next iteration yields exactly the batches that were left.

        Raises:
            CheckpointError: not a cursor, or one beyond the samples that are there.
        """
        epoch, samples = state.get("epoch"), state.get("samples")
        if not (isinstance(epoch, int) and epoch >= 0 and isinstance(samples, int) and 0 <= samples <= self._total):
            raise CheckpointError(f"cursor: expected epoch >= 0 and samples from 0 to {self._total}, got {dict(state)!r}")
        self._epoch, self._samples, self._resume = epoch, samples, samples

    def _begin(self) -> int:
        """The sample at which an iteration that starts now begins; only the first one after `load_state_dict` begins in the middle."""
        self._samples, self._resume = self._resume, 0
        return self._samples
