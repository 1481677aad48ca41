# SPDX-License-Identifier: Apache-2.0
"""Where the registry lives: MLflow's store, its artifacts, the promotion log, and the online stores of the bundles."""

import os
from pathlib import Path

from recsys.core.config import Config
from recsys.core.files import sha256_json

HOME = "RECSYS_HOME"


class Location(Config):
    """The registry's addresses.

    Attributes:
        tracking_uri: MLflow's tracking and registry store.
        artifacts: the folder of MLflow's artifacts.
        log: the SQLite file of the promotion log.
        online: the folder of the embedded online stores.
    """

    tracking_uri: str
    artifacts: Path
    log: Path
    online: Path

    @classmethod
    def under(cls, home: Path) -> "Location":
        """A registry on local disk below ``home``."""
        home = home.resolve()
        return cls(
            tracking_uri=f"sqlite:///{home / 'mlflow.db'}",
            artifacts=home / "mlartifacts",
            log=home / "promotions.db",
            online=home / "online",
        )

    def online_store(self, feature_versions: dict[str, str]) -> Path:
        """The embedded online store of these versions of the features.

        Each version has its own, so that a bundle finds what it was trained on while another bundle's features are materialised.
        """
        return self.online / f"{sha256_json(feature_versions)[:16]}.sqlite"


def home() -> Path:
    """The folder of runs, registry and online store: ``RECSYS_HOME``, or ``runs`` below the current folder."""
    return Path(os.environ.get(HOME, "runs"))
