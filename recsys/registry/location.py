# SPDX-License-Identifier: Apache-2.0
"""Where the registry lives: MLflow's store with the promotion log in it, its artifacts, and what hosts keep beside them."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recsys.core.config import Config
from recsys.core.files import sha256_json

HOME, TRACKING_URI, ARTIFACTS = "RECSYS_HOME", "RECSYS_TRACKING_URI", "RECSYS_ARTIFACTS"

_USER_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^/\s]*@")
_QUERY_PASSWORD = re.compile(r"([?&]password=)[^&\s]*")


class Location(Config):
    """The registry's addresses. Passwords are masked wherever it is printed.

    Attributes:
        tracking_uri: MLflow's tracking and registry store, ``sqlite:///...`` or ``postgresql://...``.
        artifacts: a folder, or ``s3://bucket/prefix``, of MLflow's artifacts.
        log: the URL of the database that holds the promotion log: that of MLflow's store.
        online: the folder of the embedded online stores.
        cache: the folder of downloaded bundles.
        compiled: the folder of what hosts compile from bundles, by their sha256.
    """

    tracking_uri: str
    artifacts: str
    log: str
    online: Path
    cache: Path
    compiled: Path

    @classmethod
    def under(cls, home: Path) -> "Location":
        """A registry on local disk below ``home``; ``RECSYS_TRACKING_URI`` and ``RECSYS_ARTIFACTS`` put its two parts elsewhere."""
        home = home.resolve()
        tracking_uri = os.environ.get(TRACKING_URI) or f"sqlite:///{home / 'mlflow.db'}"
        return cls(
            tracking_uri=tracking_uri,
            artifacts=os.environ.get(ARTIFACTS) or str(home / "mlartifacts"),
            log=tracking_uri,
            online=home / "online",
            cache=home / "cache",
            compiled=home / "compiled",
        )

    def online_store(self, feature_versions: dict[str, str]) -> Path:
        """The embedded online store of these versions of the features.

        Each version has its own, so that a bundle finds what it was trained on while another bundle's features are materialised.
        """
        return self.online / f"{sha256_json(feature_versions)[:16]}.sqlite"

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return [(name, masked(value) if isinstance(value, str) else value) for name, value in super().__repr_args__()]


def masked(address: str) -> str:
    """An address, or a text with addresses in it, without their passwords."""
    return _QUERY_PASSWORD.sub(r"\1***", _USER_PASSWORD.sub(r"\1***@", address))


def home() -> Path:
    """The folder of runs, registry and online store: ``RECSYS_HOME``, or ``runs`` below the current folder."""
    return Path(os.environ.get(HOME, "runs"))
