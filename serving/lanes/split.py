# SPDX-License-Identifier: Apache-2.0
"""Which users a canary answers: always the same ones, and all whom it answered at a smaller percent."""

import hashlib

from recsys.registry import Event

SALT = "salt"
"""The detail of a canary's event that holds the id of the event with which it began."""


def salt_of(event: Event) -> int:
    """What the split of a canary is drawn by: the id of its first event, whatever step it is at."""
    return int(event.details.get(SALT, event.id))


def place_of(user_id: str, salt: int) -> float:
    """Where a user stands between 0 and 1, evenly spread over users, and anew for every salt."""
    digest = hashlib.blake2b(f"{salt}:{user_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_in(user_id: str, event: Event) -> bool:
    """Whether a user is one of the canary's."""
    return place_of(user_id, salt_of(event)) < float(event.details["percent"]) / 100
