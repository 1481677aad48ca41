# SPDX-License-Identifier: Apache-2.0
"""Where a run's parameters, metrics and files are recorded: MLflow, a file of JSON lines, or nowhere."""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from recsys.core.files import write_bytes

_FORBIDDEN = re.compile(r"[^\w\-. :/]")  # what MLflow does not allow in a name
_PARAM_LENGTH = 6000
_BATCH = 100  # MLflow takes at most 100 parameters and 1,000 metrics at once


class Tracker(Protocol):
    """What is recorded of a run."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Values that were chosen; nested mappings become dotted names."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values that were measured at a step."""
        ...

    def log_artifact(self, path: Path) -> None:
        """A file, or a folder with everything in it."""
        ...


class NullTracker:
    """Records nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_artifact(self, path: Path) -> None:
        """Nothing."""


class JsonlTracker:
    """Metrics as lines ``{"step": 120, "loss": 0.43, ...}`` of a file; a value that is not finite is null.

    Args:
        path: the file; it is continued where it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing: the file holds metrics only."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line."""
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def log_artifact(self, path: Path) -> None:
        """Nothing: files stay where they are."""

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``, which a run that continues from there writes again, and one that was cut off."""
        if self.path.exists():
            lines = [line for line in self.path.read_text("utf-8").splitlines() if _step(line) <= step]
            write_bytes(self.path, "".join(f"{line}\n" for line in lines).encode())

    def rows(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text("utf-8").splitlines()] if self.path.exists() else []


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Prefixed:
    """A tracker that puts ``prefix/`` before every name, so that several trainings share one run."""

    def __init__(self, tracker: Tracker, prefix: str) -> None:
        self._tracker, self._prefix = tracker, prefix

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Under the prefix."""
        self._tracker.log_params({f"{self._prefix}/{name}": value for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Under the prefix."""
        self._tracker.log_metrics({f"{self._prefix}/{name}": value for name, value in metrics.items()}, step)

    def log_artifact(self, path: Path) -> None:
        """As it is."""
        self._tracker.log_artifact(path)


class MLflowTracker:
    """One MLflow run. It sets no global state of MLflow, so that several may be open; see `start_run`.

    Characters that MLflow does not allow in a name are replaced: ``@`` by ``_at_``, others by ``_``.

    Args:
        tracking_uri: MLflow's store, such as ``sqlite:////absolute/path/mlflow.db``.
        run_id: an existing run.
    """

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        self._client = _client(tracking_uri)
        self.run_id = run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record parameters, which MLflow never lets change."""
        from mlflow.entities import Param

        values = [Param(_name(name), str(value)[:_PARAM_LENGTH]) for name, value in _flat(params)]
        for start in range(0, len(values), _BATCH):
            self._client.log_batch(self.run_id, params=values[start : start + _BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(_name(name), float(value), now, step) for name, value in metrics.items()]
        for start in range(0, len(values), _BATCH):
            self._client.log_batch(self.run_id, metrics=values[start : start + _BATCH])

    def log_artifact(self, path: Path) -> None:
        """Copy a file, or a folder with everything in it, to the run's artifacts."""
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
        else:
            self._client.log_artifact(self.run_id, str(path))

    def log_text(self, text: str, name: str) -> None:
        """Write a text file among the run's artifacts."""
        self._client.log_text(self.run_id, text, name)

    def end(self, status: str) -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._client.set_terminated(self.run_id, status)


@contextmanager
def start_run(tracking_uri: str, artifacts: Path | str, experiment: str, name: str) -> Iterator[MLflowTracker]:
    """A new MLflow run for the length of a block: FINISHED, KILLED where the process was asked to stop, or FAILED.

    Args:
        tracking_uri: MLflow's store.
        artifacts: a folder, or a URI such as ``s3://bucket/prefix``, for an experiment that does not exist yet.
        experiment: by its name; created where it does not exist.
        name: of the run.
    """
    client = _client(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    identity = found.experiment_id if found else client.create_experiment(experiment, artifact_location=_uri(artifacts))
    tracker = MLflowTracker(tracking_uri, client.create_run(identity, run_name=name).info.run_id)
    try:
        yield tracker
    except (SystemExit, KeyboardInterrupt):
        tracker.end("KILLED")
        raise
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")


def _uri(artifacts: Path | str) -> str:
    return artifacts if isinstance(artifacts, str) and "://" in artifacts else Path(artifacts).resolve().as_uri()


def _client(tracking_uri: str) -> Any:
    # MLflow takes seconds to import, and asks for this variable when it does.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def _name(name: str) -> str:
    return _FORBIDDEN.sub("_", name.replace("@", "_at_"))


def _flat(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in params.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows
