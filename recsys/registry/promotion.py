# SPDX-License-Identifier: Apache-2.0
"""Which bundle is live: register it, promote it on evidence, and go back. MLflow underneath, the promotion log on top.

The log decides; the MLflow aliases ``champion``, ``previous`` and ``challenger`` are written from it, and `Store.load` refuses an alias
that the log does not confirm, so that moving an alias by hand puts nothing live.
"""

import getpass
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from recsys.bundle.manifest import verify
from recsys.core.errors import RegistryError
from recsys.core.files import read_json
from recsys.registry.events import Action, Entry, Event
from recsys.registry.evidence import Evidence
from recsys.registry.gates import Gate, GateResult, run_gates
from recsys.registry.states import State, check
from recsys.registry.store import SHA_TAG, Store

GATES_TAG = "gates"


@dataclass(frozen=True)
class Override:
    """Somebody who answers for a promotion in spite of failed gates.

    Raises:
        RegistryError: the actor or the reason is empty.
    """

    actor: str
    reason: str

    def __post_init__(self) -> None:
        for name, value in (("actor", self.actor), ("reason", self.reason)):
            if not value.strip():
                raise RegistryError(f"override.{name}: expected who answers for it and why, got {value!r}")


@dataclass(frozen=True)
class _Judged:
    """A candidate and what the gates found."""

    sha256: str
    results: list[GateResult]
    details: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        return [result.gate for result in self.results if not result.passed]

    def entry(self, action: Action, version: int, reason: str, **details: Any) -> Entry:
        """An entry of the log with the report."""
        return Entry(action, version, self.sha256, reason, [result.model_dump() for result in self.results], self.details | details)


class Registry(Store):
    """Registered bundles, and the moves between their states (`recsys.registry.states`). Each move is an event of the log."""

    def register(self, directory: Path, model: str, run_id: str, *, actor: str | None = None) -> int:
        """Copy a bundle into the artifacts of an MLflow run and register it; returns the version.

        Raises:
            BundleError: the bundle is incomplete or was changed.
            ConfigError: its manifest lacks a field.
        """
        from mlflow.exceptions import MlflowException

        sha256 = verify(directory).sha256
        source = self.artifacts.put(directory, sha256, run_id)
        try:
            self._client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._client.create_registered_model(model)
        version = int(self._client.create_model_version(model, source, run_id, tags={SHA_TAG: sha256}).version)
        self.log.append(model, Entry("register", version, sha256, "registered"), actor=actor or getpass.getuser())
        return version

    def validate(
        self,
        model: str,
        version: int,
        *,
        gates: tuple[Gate, ...],
        evidence: Evidence,
        expected: int | None,
        actor: str | None = None,
        reason: str = "gates passed",
    ) -> tuple[Event, list[GateResult]]:
        """Run the gates on the registered bundle; logs ``validate`` or ``refuse``. For the arguments and errors see `promote`."""
        judged = self._judge(model, version, "validate", gates, evidence, expected, must_compare=True)
        if judged.failed:
            return self._refuse(model, version, judged, actor), judged.results
        (event,) = self.log.append(model, judged.entry("validate", version, reason), actor=actor or getpass.getuser(), expected=expected)
        self._publish(model, version, "passed", judged)
        return event, judged.results

    def promote(
        self,
        model: str,
        version: int,
        *,
        gates: tuple[Gate, ...],
        evidence: Evidence,
        expected: int | None,
        actor: str | None = None,
        reason: str = "gates passed",
        override: Override | None = None,
    ) -> tuple[Event, list[GateResult]]:
        """Run the gates on the registered bundle and, if all hold, make it the champion; the verdict is logged either way.

        Args:
            model: the registered model.
            version: the candidate.
            gates: what must hold.
            evidence: what they look at. The bundles and the candidate's metrics are taken from the registry, whatever it says of them.
            expected: the champion that the comparison was made with; another one by now is an error.
            actor: who asks; the user of this process by default.
            reason: why.
            override: promotes in spite of failed gates, and is part of the event then.

        Returns:
            The event ``promote`` or ``refuse``, and what the gates found.

        Raises:
            RegistryError: the champion is not ``expected``, or was there without a comparison, or the version cannot become the champion
                from where it stands, or its artifact is not what was registered.
        """
        judged = self._judge(model, version, "promote", gates, evidence, expected, must_compare=override is None)
        if not judged.failed:
            entries, by, verdict = [judged.entry("promote", version, reason)], actor or getpass.getuser(), "passed"
            if self.log.state(model, version) in (None, State.REGISTERED, State.RETIRED):
                entries.insert(0, judged.entry("validate", version, reason))
        elif override is not None:
            answer = {"actor": override.actor, "reason": override.reason, "failed": judged.failed}
            entries, by, verdict = [judged.entry("promote", version, override.reason, override=answer)], override.actor, "overridden"
        else:
            return self._refuse(model, version, judged, actor), judged.results
        event = self.log.append(model, *entries, actor=by, expected=expected)[-1]
        self.project(model)
        self._publish(model, version, verdict, judged)
        return event, judged.results

    def stage(
        self,
        model: str,
        version: int,
        to: Literal["shadow", "canary"],
        *,
        percent: float | None = None,
        actor: str | None = None,
        reason: str,
        details: Mapping[str, Any] | None = None,
    ) -> Event:
        """Make a validated version the shadow, or the canary of ``percent`` of the users, in the place of the one before.

        Raises:
            RegistryError: a canary without a percent between 0 and 100, a shadow with one, or a version that was not validated.
        """
        if (percent is None) != (to == "shadow") or (percent is not None and not 0 < percent < 100):
            wanted = "none for a shadow" if to == "shadow" else "more than 0 and less than 100 for a canary"
            raise RegistryError(f"percent: expected {wanted}, got {percent}")
        share = {} if percent is None else {"percent": float(percent)}
        return self._move(model, version, to, actor, reason, {**(details or {}), **share})

    def withdraw(
        self, model: str, version: int, *, actor: str | None = None, reason: str, details: Mapping[str, Any] | None = None
    ) -> Event:
        """Take the canary or the shadow back; it stays validated.

        Raises:
            RegistryError: the version is neither.
        """
        return self._move(model, version, "withdraw", actor, reason, dict(details or {}))

    def retire(self, model: str, version: int, *, actor: str | None = None, reason: str) -> Event:
        """Say that a version is not wanted any more.

        Raises:
            RegistryError: it is the champion, or retired already.
        """
        return self._move(model, version, "retire", actor, reason, {})

    def rollback(self, model: str, *, actor: str | None = None, reason: str, details: Mapping[str, Any] | None = None) -> Event:
        """Make the previous champion the champion again, without gates.

        The champion that goes is the previous one then, so that a second rollback undoes the first.

        Raises:
            RegistryError: there is no previous champion.
        """
        standing = self.log.standing(model)
        if standing.champion is None or standing.previous is None:
            raise RegistryError(f"{model}: there is no previous champion to go back to")
        sha256 = self.log.event(standing.crowned[standing.previous]).sha256
        entry = Entry("rollback", standing.previous, sha256, reason, details=dict(details or {}))
        (event,) = self.log.append(model, entry, actor=actor or getpass.getuser(), expected=standing.champion)
        self.project(model)
        return event

    def _judge(
        self,
        model: str,
        version: int,
        action: Action,
        gates: tuple[Gate, ...],
        evidence: Evidence,
        expected: int | None,
        *,
        must_compare: bool,
    ) -> _Judged:
        """Run the gates on what is registered, if the action can come of it."""
        check(model, self.log.standing(model), action, version, override=True)
        if expected is not None and evidence.comparison is None and must_compare:
            raise RegistryError(f"{model}: version {expected} is champion, so the candidate must be compared with it")
        directory, sha256 = self.download(model, version), self.sha256(model, version)
        if (found := verify(directory).sha256) != sha256:
            raise RegistryError(f"{model}: version {version} has sha256 {found}, but {sha256} was registered: refused")
        held = replace(
            evidence,
            directory=directory,
            metrics=read_json(directory / "metrics.json"),
            comparison={} if expected is not None and evidence.comparison is None else evidence.comparison,
            champion=None if expected is None else self.download(model, expected),
        )
        comparison = None if held.comparison is None else {name: dict(interval) for name, interval in held.comparison.items()}
        results = run_gates(gates, held)
        return _Judged(sha256, results, {"against": expected, "comparison": comparison, "measured": dict(held.measured)})

    def _refuse(self, model: str, version: int, judged: _Judged, actor: str | None) -> Event:
        entry = judged.entry("refuse", version, f"failed gates: {', '.join(judged.failed)}")
        (event,) = self.log.append(model, entry, actor=actor or getpass.getuser())
        self.project(model)
        self._publish(model, version, "failed", judged)
        return event

    def _move(self, model: str, version: int, action: Action, actor: str | None, reason: str, details: dict[str, Any]) -> Event:
        entry = Entry(action, version, self.sha256(model, version), reason, details=details)
        (event,) = self.log.append(model, entry, actor=actor or getpass.getuser())
        self.project(model)
        return event

    def _publish(self, model: str, version: int, verdict: str, judged: _Judged) -> None:
        """Put the verdict beside the version, where MLflow's pages show it: as a tag, and the report as a file of its run."""
        self._client.set_model_version_tag(model, str(version), GATES_TAG, verdict)
        report = json.dumps([result.model_dump(mode="json") for result in judged.results], indent=2)
        self._client.log_text(self.version(model, version).run_id, report, f"gates/{model}-{version}.json")
