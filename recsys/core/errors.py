# SPDX-License-Identifier: Apache-2.0
"""Errors that name the field, the value and what was expected."""

import difflib
from collections.abc import Iterable


class RecsysError(Exception):
    """Base of every error that this framework raises on purpose. Its message is meant for the user."""


class ConfigError(RecsysError):
    """A recipe or an override holds an unknown key or a bad value."""


class ComponentError(RecsysError):
    """A component was asked for that nobody registered, or was registered twice."""


class SchemaError(RecsysError):
    """A table does not have the columns or types that its schema declares."""


class DataError(RecsysError):
    """Data from outside breaks a rule that cannot be repaired by dropping rows."""


class CheckpointError(RecsysError):
    """A training checkpoint is incomplete, corrupt, or belongs to another run."""


class BundleError(RecsysError):
    """A bundle is incomplete, was tampered with, or mixes versions."""


class RegistryError(RecsysError):
    """A promotion, a rollback or an alias does not agree with the promotion log."""


class CannotScoreNewItems(RecsysError):
    """A model bound to the items of its training was asked to score another item."""


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key most like ``key``, or None where nothing is alike."""
    matches = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(what: str, key: str, known: Iterable[str]) -> str:
    """A sentence for an unknown ``key``: the nearest known one first, then all of them."""
    names = sorted(known)
    hint = nearest(key, names)
    tail = f"; did you mean {hint!r}?" if hint else ""
    return f"unknown {what} {key!r}{tail} (known: {', '.join(names) or 'none'})"
