# SPDX-License-Identifier: Apache-2.0
"""Bundles beside the champion: a canary that answers some of the users, and a shadow that answers nobody."""

from serving.lanes.canary import Canary
from serving.lanes.following import lanes_of
from serving.lanes.lane import Lane
from serving.lanes.policy import CanaryPolicy
from serving.lanes.shadow import Shadow

__all__ = ["Canary", "CanaryPolicy", "Lane", "Shadow", "lanes_of"]
