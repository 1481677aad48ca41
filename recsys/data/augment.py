# SPDX-License-Identifier: Apache-2.0
"""Histories told in another way in every epoch: what small data needs before a transformer learns from it what item-kNN reads off it."""

import numpy as np
from pydantic import Field

from recsys.core.config import Config
from recsys.data.sequences import SequenceData


class Augmentation(Config):
    """How training histories vary from epoch to epoch; evaluation never sees any of it.

    Cropping, masking and reordering of histories are CL4SRec's (arXiv 2010.14395), which contrasts two such views; here they are plain
    augmentation of the next-item task. Reversal is ours: it makes "A before B" evidence for "B before A", the symmetry that item-kNN
    has by construction.

    Attributes:
        reverse: the probability with which a user's whole history is read backwards.
        jitter: events are reordered by their place plus normal noise of this standard deviation, in events. With 0 only events of one
            step change places.
        hide: the probability with which an event is left out of an epoch.
    """

    reverse: float = Field(0.0, ge=0, le=1)
    jitter: float = Field(0.0, ge=0)
    hide: float = Field(0.0, ge=0, lt=1)


def retell(data: SequenceData, augmentation: Augmentation, seed: int, epoch: int) -> SequenceData:
    """The same events of the same users in the order of one epoch; every event is a step of its own, so that it predicts the next one.

    Times stay with their events, and are no longer in order.
    """
    random = np.random.default_rng([seed, epoch, 0])
    events = len(data.items)
    place = np.arange(events) - data.offsets[data.owner]
    noise = random.normal(0.0, 1.0, events)
    key = place + augmentation.jitter * noise if augmentation.jitter else data.seen + random.random(events) * 0.5
    backwards = random.random(len(data.users)) < augmentation.reverse
    order = np.lexsort((np.where(backwards[data.owner], -key, key), data.owner))
    return SequenceData(data.users, data.offsets, data.items[order], np.arange(events), None if data.times is None else data.times[order])


def shown(events: int, augmentation: Augmentation, seed: int, epoch: int) -> np.ndarray:
    """bool ``[events]``: the events that an epoch has."""
    kept: np.ndarray = np.random.default_rng([seed, epoch, 1]).random(events) >= augmentation.hide
    return kept


def offsets(data: SequenceData, stride: int, seed: int, epoch: int) -> np.ndarray:
    """int64 ``[users]``, from 0 to ``stride - 1``: how far into a stride each user's first window begins.

    With windows that always begin at the same events, the events after a beginning would never be seen with more context.
    """
    drawn: np.ndarray = np.random.default_rng([seed, epoch, 2]).integers(0, stride, len(data.users))
    return drawn
