# SPDX-License-Identifier: Apache-2.0
"""Registered bundles, found by an address and loaded as far as the promotion log confirms them."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recsys.core.errors import RegistryError
from recsys.registry.artifacts import Artifacts
from recsys.registry.events import Event
from recsys.registry.history import PromotionLog
from recsys.registry.location import Location, masked

if TYPE_CHECKING:
    from recsys.bundle.bundle import Bundle

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
ALIASES = (CHAMPION, PREVIOUS, CHALLENGER)
SHA_TAG = "bundle_sha256"
_URI = re.compile(r"^models:/(?P<model>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


class Store:
    """MLflow's registry with the log that decides what its aliases are.

    Args:
        location: where MLflow's store with the promotion log, and the artifacts are.
    """

    def __init__(self, location: Location) -> None:
        from mlflow import MlflowClient

        self.location = location
        self.log = PromotionLog(location.log)
        self._client = MlflowClient(location.tracking_uri, location.tracking_uri)
        self.artifacts = Artifacts(location, self._client)

    def resolve(self, uri: str) -> tuple[str, int, str]:
        """Model, version and expected hash of ``models:/name@alias`` or ``models:/name/3``.

        Raises:
            RegistryError: the address is malformed, names nothing, or an alias that the log does not confirm.
        """
        match = _URI.match(uri)
        if match is None:
            raise RegistryError(f"{uri!r}: expected models:/<name>@<alias> or models:/<name>/<version>")
        model, alias = match["model"], match["alias"]
        found = self._find(uri, model, match["version"], alias)
        version = int(found.version)
        if alias is None:
            return model, version, self._sha256(model, found)
        if alias not in ALIASES:
            raise RegistryError(f"{uri}: the promotion log confirms the aliases {', '.join(ALIASES)} only: refused")
        event = self._logged(model, alias)
        if event is None or event.to_version != version:
            logged = event.to_version if event else "none"
            raise RegistryError(f"{uri}: the alias points at version {version}, but the promotion log says {logged}: refused")
        return model, version, event.sha256

    def download(self, model: str, version: int) -> Path:
        """The local directory of a registered bundle; what is not on this machine is fetched into the cache.

        Raises:
            RegistryError: there is no such version, or its artifact is absent or another one.
        """
        found = self.version(model, version)
        return self.artifacts.get(found.source, self._sha256(model, found))

    def load(self, uri: str, *, mmap: bool = False, quantize: Literal["int8"] | None = None) -> tuple["Bundle", int]:
        """The bundle of an address, verified against the log, and its version; for the options see `recsys.bundle.bundle.Bundle.load`.

        Raises:
            RegistryError: see `resolve`; or the artifact is not the one that was registered.
            BundleError: a file was changed.
        """
        from recsys.bundle.bundle import Bundle

        model, version, expected = self.resolve(uri)
        bundle = Bundle.load(self.download(model, version), mmap=mmap, quantize=quantize)
        if bundle.manifest.sha256 != expected:
            raise RegistryError(f"{uri}: version {version} has sha256 {bundle.manifest.sha256}, but {expected} was registered: refused")
        return bundle, version

    def models(self) -> list[str]:
        """The names of the registered models."""
        return sorted(found.name for found in _pages(self._client.search_registered_models))

    def versions(self, model: str) -> list[Any]:
        """MLflow's records of a model's versions, the oldest first."""
        found = _pages(lambda **page: self._client.search_model_versions(f"name='{model}'", **page))
        return sorted(found, key=lambda record: int(record.version))

    def version(self, model: str, version: int) -> Any:
        """MLflow's record of a version.

        Raises:
            RegistryError: there is none.
        """
        return self._find(f"models:/{model}/{version}", model, str(version), None)

    def sha256(self, model: str, version: int) -> str:
        """The hash under which a version was registered.

        Raises:
            RegistryError: there is no such version.
        """
        return self._sha256(model, self.version(model, version))

    def forget(self, model: str, version: int) -> None:
        """Delete MLflow's record of a version. The log keeps its events, and its number is not given again."""
        self._client.delete_model_version(model, str(version))

    def project(self, model: str) -> None:
        """Write MLflow's aliases from the log. Safe to repeat, and repeated by every move."""
        logged = {alias: self._logged(model, alias) for alias in ALIASES}
        wanted = {alias: str(event.to_version) for alias, event in logged.items() if event is not None}
        found = dict(self._client.get_registered_model(model).aliases)
        for alias in ALIASES:
            if alias in wanted and str(found.get(alias)) != wanted[alias]:
                self._client.set_registered_model_alias(model, alias, wanted[alias])
            elif alias in found and alias not in wanted:
                self._client.delete_registered_model_alias(model, alias)

    def _logged(self, model: str, alias: str) -> Event | None:
        """The event that an alias stands for."""
        return {CHAMPION: self.log.champion, PREVIOUS: self.log.previous, CHALLENGER: self.log.challenger}[alias](model)

    def _find(self, uri: str, model: str, version: str, alias: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            if alias is not None:
                return self._client.get_model_version_by_alias(model, alias)
            return self._client.get_model_version(model, version)
        except MlflowException as error:
            where = masked(self.location.tracking_uri)
            raise RegistryError(f"{uri}: not in the registry at {where}: {masked(str(error.message))}") from None

    def _sha256(self, model: str, found: Any) -> str:
        """What the log says of a version; MLflow's tag where it says nothing, of what an earlier version of this package registered."""
        return self.log.sha256(model, int(found.version)) or str(found.tags.get(SHA_TAG, ""))


def _pages(search: Callable[..., Any]) -> list[Any]:
    """All results of one of MLflow's searches."""
    found = search()
    results = list(found)
    while found.token:
        found = search(page_token=found.token)
        results += found
    return results
