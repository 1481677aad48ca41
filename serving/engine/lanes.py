# SPDX-License-Identifier: Apache-2.0
"""What an engine needs of bundles that answer some of its users in the champion's place (`serving.lanes`)."""

from typing import Protocol

from serving.engine.loaded import Loaded
from serving.engine.work import Answer, Rejected


class Lanes(Protocol):
    """Chooses who answers, and is told how it went. Called on the event loop: must be quick."""

    def start(self) -> None:
        """Begin."""
        ...

    def stop(self) -> None:
        """End; does not wait."""
        ...

    def renew(self) -> None:
        """Bring bundles up to date with the changes of the catalogue."""
        ...

    def choose(self, user_id: str, champion: Loaded) -> Loaded:
        """The bundle that answers a user."""
        ...

    def ended(self, loaded: Loaded, seconds: float, outcome: Answer | Rejected) -> None:
        """A request that was let in has ended, after so many seconds."""
        ...
