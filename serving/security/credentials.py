# SPDX-License-Identifier: Apache-2.0
"""Who a caller is: an API key, of which the configuration holds hashes only, or a signed token (JWT)."""

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import jwt
from pydantic import Field

from recsys.core.config import Config, parse
from recsys.core.errors import ConfigError
from recsys.core.files import read_json

SCOPES = ("recommend", "events", "admin", "metrics")
Scope = Literal["recommend", "events", "admin", "metrics"]
SECRET, PUBLIC_KEY = "RECSYS_JWT_SECRET", "RECSYS_JWT_PUBLIC_KEY"
"""Variables of the environment: the secret of HS256, at least 32 bytes, or the public key of RS256 as PEM. No setting holds a secret."""
_SHORTEST_SECRET = 32
_LONGEST = 8192


class Key(Config):
    """An API key, which itself is written nowhere.

    Attributes:
        name: of the caller, for logs.
        sha256: of the key, in hexadecimal. Keys are long random strings, so that a plain hash does.
        scopes: what it may do.
        rate: requests a second, over time; None for as many as come.
        burst: requests at once.
    """

    name: Annotated[str, Field(min_length=1, max_length=64)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1)] = 10


class Tokens(Config):
    """Which tokens are taken: their claims ``exp``, ``aud``, ``iss``, ``sub`` must be there, and ``scope`` names scopes, with spaces.

    Attributes:
        algorithm: HS256 with `SECRET`, or RS256 with `PUBLIC_KEY`; a token of another algorithm is refused.
        audience: ``aud``.
        issuer: ``iss``.
        rate: see `Key`, for each ``sub``.
        burst: likewise.
    """

    algorithm: Literal["HS256", "RS256"]
    audience: Annotated[str, Field(min_length=1)]
    issuer: Annotated[str, Field(min_length=1)]
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1)] = 10


class AccessFile(Config):
    """The file that a server is told of with ``--access``."""

    keys: tuple[Key, ...] = ()
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        name: unique among callers.
        scopes: what it may do.
        rate: see `Key`.
        burst: see `Key`.
    """

    name: str
    scopes: frozenset[str]
    rate: float | None
    burst: int


class Credentials:
    """What tells callers.

    Args:
        access: the keys' hashes and what tokens must say.
        environment: holds the secret or the public key of tokens.

    Raises:
        ConfigError: there is nothing by which anybody could be told, two keys share a name or a hash, or the environment lacks what
            tokens are verified with.
    """

    def __init__(self, access: AccessFile, environment: Mapping[str, str] | None = None) -> None:
        if not access.keys and access.tokens is None:
            raise ConfigError("access: expected keys or tokens, got neither: nobody could ask anything")
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in access.keys]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ConfigError(f"access: keys: {what}: expected each once, but {twice[0]!r} is there several times")
        self._access = access
        self._callers = [
            (bytes.fromhex(key.sha256), Caller(f"key {key.name}", frozenset(key.scopes), key.rate, key.burst)) for key in access.keys
        ]
        self._verifier = None if access.tokens is None else _verifier(access.tokens, os.environ if environment is None else environment)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Those of a file; errors as of the class, and where it cannot be read."""
        try:
            content = read_json(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"access: cannot read {path}: {error}") from None
        return cls(parse(AccessFile, content, source=str(path)))

    def caller(self, given: str) -> Caller | None:
        """Who gave an API key or a token; None where it is neither."""
        if len(given) > _LONGEST:
            return None
        return self._by_key(given) or self._by_token(given)

    def _by_key(self, given: str) -> Caller | None:
        digest, found = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), None
        # All are compared, each in constant time: how long it takes tells nothing.
        for expected, caller in self._callers:
            if hmac.compare_digest(digest, expected):
                found = caller
        return found

    def _by_token(self, given: str) -> Caller | None:
        tokens = self._access.tokens
        if tokens is None or self._verifier is None:
            return None
        try:
            claims = jwt.decode(
                given,
                self._verifier,
                algorithms=[tokens.algorithm],
                audience=tokens.audience,
                issuer=tokens.issuer,
                options={"require": ["exp", "aud", "iss", "sub"]},
            )
        except (jwt.PyJWTError, ValueError):
            return None
        scope = claims.get("scope")
        scopes = frozenset(scope.split()) & frozenset(SCOPES) if isinstance(scope, str) else frozenset()
        return Caller(f"token {claims['sub']}", scopes, tokens.rate, tokens.burst)


def _verifier(tokens: Tokens, environment: Mapping[str, str]) -> str:
    name = SECRET if tokens.algorithm == "HS256" else PUBLIC_KEY
    value = environment.get(name, "")
    if not value:
        raise ConfigError(f"access: tokens: {tokens.algorithm} needs the variable {name}, which is not set")
    if tokens.algorithm == "HS256" and len(value.encode()) < _SHORTEST_SECRET:
        raise ConfigError(f"access: tokens: {name}: expected at least {_SHORTEST_SECRET} bytes, got {len(value.encode())}")
    return value
