# SPDX-License-Identifier: Apache-2.0
"""What an engine needs of bundles that answer some of its users in the champion's place (`serving.lanes`)."""

from collections.abc import Mapping
from typing import Any, Protocol

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

    def ended(self, request_id: str, loaded: Loaded, seconds: float, outcome: Answer | Rejected) -> None:
        """A request that was let in has ended, after so many seconds."""
        ...

    def feedback(self, request_id: str, user_id: str, item_id: str, values: Mapping[str, Any]) -> None:
        """An event of a user about an item, which the list of this request has shown."""
        ...

    @property
    def canary(self) -> Loaded | None:
        """The bundle that answers some of the users; None while there is none."""
        ...
