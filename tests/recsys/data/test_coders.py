# SPDX-License-Identifier: Apache-2.0
"""Slots of hashes against a dictionary, where hashes crowd."""

import numpy as np
import pytest

from recsys.data.encoding.coders import _Slots


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crowd", [1, 2**40, 2**62])
def test_slots_find_every_hash_and_no_other(seed: int, crowd: int) -> None:
    """``crowd``: hashes differ by so little that they want the same slots, by the lower bits or by the last slots of all."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, 300, int(random.integers(1, 200))).astype(np.uint64)
    hashes = random.permutation(np.unique(np.uint64(2**64 - 1) - drawn * np.uint64(crowd)))
    slots, places = _Slots(hashes), {int(h): i for i, h in enumerate(hashes)}
    asked = np.concatenate([hashes, random.integers(0, 2**63, 100).astype(np.uint64), hashes - np.uint64(1)])
    for asked_hash, place in zip(asked.tolist(), slots.find(asked).tolist(), strict=True):
        assert 0 <= place < len(hashes)
        if asked_hash in places:
            assert hashes[place] == asked_hash
