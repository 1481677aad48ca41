# SPDX-License-Identifier: Apache-2.0
"""Which bundle is live: register it, promote it on evidence, load it, and go back. MLflow underneath, the promotion log on top.

The log decides; the MLflow aliases ``champion`` and ``previous`` are written from it, and `load` refuses an alias that the log does not
confirm, so that moving an alias by hand puts nothing live.
"""

import getpass
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.bundle.manifest import verify
from recsys.core.errors import RegistryError
from recsys.core.files import read_json
from recsys.registry.gates import Gate, GateResult, run_gates
from recsys.registry.history import Event, PromotionLog
from recsys.registry.location import Location

if TYPE_CHECKING:
    from recsys.bundle.bundle import Bundle

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

CHAMPION, PREVIOUS = "champion", "previous"
SHA_TAG = "bundle_sha256"
_URI = re.compile(r"^models:/(?P<model>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")


class Registry:
    """Registered bundles and their history.

    Args:
        location: where MLflow's store, its artifacts and the promotion log are.
    """

    def __init__(self, location: Location) -> None:
        from mlflow import MlflowClient

        location.log.parent.mkdir(parents=True, exist_ok=True)
        self.location = location
        self.log = PromotionLog(location.log)
        self._client = MlflowClient(location.tracking_uri, location.tracking_uri)

    def register(self, directory: Path, model: str, run_id: str) -> int:
        """Copy a bundle into the artifacts of an MLflow run and register it; returns the version.

        Raises:
            BundleError: the bundle is incomplete or was changed.
        """
        from mlflow.exceptions import MlflowException

        manifest = verify(directory)
        self._client.log_artifacts(run_id, str(directory), "bundle")
        try:
            self._client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(model)
        source = f"{self._client.get_run(run_id).info.artifact_uri}/bundle"
        version = self._client.create_model_version(model, source, run_id, tags={SHA_TAG: manifest.sha256})
        return int(version.version)

    def promote(
        self,
        model: str,
        version: int,
        *,
        gates: tuple[Gate, ...],
        comparison: Mapping[str, Mapping[str, float]] | None,
        expected: int | None,
        actor: str | None = None,
        reason: str = "gates passed",
    ) -> tuple[Event, list[GateResult]]:
        """Run the gates on the registered bundle and, if all hold, make it the champion; either way one event is logged.

        Args:
            model: the registered model.
            version: the candidate.
            gates: what must hold.
            comparison: candidate minus champion on the same events; None if there was no champion.
            expected: the champion that the comparison was made with; another one by now is an error.
            actor: who asks; the user of this process by default.
            reason: why.

        Raises:
            RegistryError: the champion is not ``expected``, or was there without a comparison.
        """
        if expected is not None and comparison is None:
            raise RegistryError(f"{model}: version {expected} is champion, so the candidate must be compared with it")
        directory = self.download(model, version)
        manifest = verify(directory)
        results = run_gates(gates, read_json(directory / "metrics.json"), comparison)
        passed = all(result.passed for result in results)
        failed = ", ".join(result.gate for result in results if not result.passed)
        event = self.log.append(
            model=model,
            action="promote" if passed else "refuse",
            actor=actor or getpass.getuser(),
            reason=reason if passed else f"failed gates: {failed}",
            to_version=version,
            sha256=manifest.sha256,
            expected=expected,
            gates=[result.model_dump() for result in results],
        )
        self.project(model)
        return event, results

    def rollback(self, model: str, *, actor: str | None = None, reason: str) -> Event:
        """Make the previous champion the champion again, without gates.

        Raises:
            RegistryError: there is no previous champion.
        """
        current, previous = self.log.champion(model), self.log.previous(model)
        if current is None or previous is None:
            raise RegistryError(f"{model}: there is no previous champion to go back to")
        event = self.log.append(
            model=model,
            action="rollback",
            actor=actor or getpass.getuser(),
            reason=reason,
            to_version=previous.to_version,
            sha256=previous.sha256,
            expected=current.to_version,
            gates=[],
        )
        self.project(model)
        return event

    def project(self, model: str) -> None:
        """Write MLflow's aliases from the log. Safe to repeat, and repeated by every promotion."""
        for alias, event in ((CHAMPION, self.log.champion(model)), (PREVIOUS, self.log.previous(model))):
            if event is not None:
                self._client.set_registered_model_alias(model, alias, str(event.to_version))

    def resolve(self, uri: str) -> tuple[str, int, str]:
        """Model, version and expected hash of ``models:/name@alias`` or ``models:/name/3``.

        Raises:
            RegistryError: the address is malformed, names nothing, or an alias that the log does not confirm.
        """
        match = _URI.match(uri)
        if match is None:
            raise RegistryError(f"{uri!r}: expected models:/<name>@<alias> or models:/<name>/<version>")
        model, alias = match["model"], match["alias"]
        from mlflow.exceptions import MlflowException

        try:
            found = (
                self._client.get_model_version_by_alias(model, alias) if alias else self._client.get_model_version(model, match["version"])
            )
        except MlflowException as error:
            raise RegistryError(f"{uri}: not in the registry at {self.location.tracking_uri}: {error.message}") from None
        version, sha256 = int(found.version), str(found.tags.get(SHA_TAG, ""))
        if alias in (CHAMPION, PREVIOUS):
            event = self.log.champion(model) if alias == CHAMPION else self.log.previous(model)
            if event is None or event.to_version != version:
                logged = event.to_version if event else "none"
                raise RegistryError(f"{uri}: the alias points at version {version}, but the promotion log says {logged}: refused")
            sha256 = event.sha256
        return model, version, sha256

    def download(self, model: str, version: int) -> Path:
        """The local directory of a registered bundle."""
        from mlflow.artifacts import download_artifacts

        found = self._client.get_model_version(model, str(version))
        return Path(download_artifacts(artifact_uri=found.source, tracking_uri=self.location.tracking_uri))

    def load(self, uri: str) -> tuple["Bundle", int]:
        """The bundle of an address, verified against the log, and its version.

        Raises:
            RegistryError: see `resolve`; or the artifact is not the one that was registered.
            BundleError: a file was changed.
        """
        from recsys.bundle.bundle import Bundle

        model, version, expected = self.resolve(uri)
        bundle = Bundle.load(self.download(model, version))
        if bundle.manifest.sha256 != expected:
            raise RegistryError(f"{uri}: version {version} has sha256 {bundle.manifest.sha256}, but {expected} was registered: refused")
        return bundle, version
