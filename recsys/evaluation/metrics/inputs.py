# SPDX-License-Identifier: Apache-2.0
"""The checks that all metrics share: equal lengths, finite numbers, labels and probabilities within their range."""

from typing import Any

import numpy as np


def vector(values: Any, name: str, length: int | None = None) -> np.ndarray:
    """``values`` as float64 ``[N]``.

    Raises:
        ValueError: not one axis, not ``length`` values, or a NaN among them.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one axis, got the shape {array.shape}")
    if length is not None and len(array) != length:
        raise ValueError(f"{name}: expected {length} values, got {len(array)}")
    if np.isnan(array).any():
        raise ValueError(f"{name}: expected numbers, got {int(np.isnan(array).sum())} NaN among {len(array)}")
    return array


def binary_labels(values: Any) -> np.ndarray:
    """Labels as float64 ``[N]``, each 0 or 1.

    Raises:
        ValueError: another value is among them.
    """
    labels = vector(values, "labels")
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise ValueError(f"labels: expected 0 or 1, got {labels[wrong][0]:g}")
    return labels


def unit_interval(values: Any, name: str, length: int | None = None) -> np.ndarray:
    """``values`` as float64 ``[N]``, each from 0 to 1.

    Raises:
        ValueError: another value is among them.
    """
    array = vector(values, name, length)
    wrong = (array < 0) | (array > 1)
    if wrong.any():
        raise ValueError(f"{name}: expected values from 0 to 1, got {array[wrong][0]:g}")
    return array


def weights_or_ones(values: Any, length: int) -> np.ndarray:
    """Weights as float64 ``[N]``, none negative and none infinite; ones where None is given."""
    if values is None:
        return np.ones(length)
    weights = vector(values, "weights", length)
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError("weights: expected finite values of at least 0")
    return weights
