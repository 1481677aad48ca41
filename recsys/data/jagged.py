# SPDX-License-Identifier: Apache-2.0
"""Lists of whole numbers in two flat arrays."""

from typing import NamedTuple

import numpy as np


class Jagged(NamedTuple):
    """Lists of int64: list b holds ``values[offsets[b]:offsets[b + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 ``[Σ lengths]``: the integers ``starts[i]`` to ``starts[i] + lengths[i] - 1``, one range after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Jagged:
    """The slices ``values[starts[i]:starts[i] + lengths[i]]``."""
    return Jagged(values[ranges(starts, lengths)], np.concatenate([[0], np.cumsum(lengths)]))
