# SPDX-License-Identifier: Apache-2.0
"""A catalogue that changes while it is served: a log of changes, and bundles that are kept up with it."""

from serving.live.catalogue import LiveCatalogue
from serving.live.changes import Action, Change, Wanted
from serving.live.log import ChangeLog

__all__ = ["Action", "Change", "ChangeLog", "LiveCatalogue", "Wanted"]
