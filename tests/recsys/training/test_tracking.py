# SPDX-License-Identifier: Apache-2.0
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.training.tracking import JsonlTracker, MLflowTracker, NullTracker, Prefixed, start_run


def test_json_lines_come_back_and_nan_is_null(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "run" / "metrics.jsonl")
    assert tracker.rows() == []
    tracker.log_metrics({"loss": 0.1 + 0.2}, 1)
    tracker.log_metrics({"auc": math.nan, "recall@10": 1.0}, 2)
    assert tracker.rows() == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "auc": None, "recall@10": 1.0}]


def test_rewinding_drops_what_comes_again_and_what_was_cut_off(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.rewind(3)
    for step in (1, 3, 4):
        tracker.log_metrics({"loss": step}, step)
    with tracker.path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    tracker.rewind(3)
    assert [row["step"] for row in tracker.rows()] == [1, 3]
    tracker.log_metrics({"loss": 9.0}, 5)
    assert [row["step"] for row in tracker.rows()] == [1, 3, 5]


def test_the_null_tracker_does_nothing(tmp_path: Path) -> None:
    tracker = Prefixed(NullTracker(), "x")
    tracker.log_params({"a": 1})
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_artifact(tmp_path)


def test_mlflow_is_imported_only_when_asked_for() -> None:
    code = "import sys, recsys.training.tracking; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_mlflow_records_a_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, artifacts = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with start_run(uri, artifacts, "quickstart", "first") as tracker:
        tracker.log_params({"trainer": {"epochs": 3, "optimizer": {"name": "adamw"}}, "long": "x" * 9000})
        tracker.log_params({f"p{i}": i for i in range(150)})
        for step, value in ((1, 0.5), (2, 0.6), (2, math.nan)):
            tracker.log_metrics({"recall@10": value, "loss": -value}, step)
        Prefixed(tracker, "ranker").log_metrics({"auc": 0.75}, 3)
        tracker.log_text("name: quickstart\n", "recipe.yaml")
        tracker.log_artifact(folder)
        tracker.log_artifact(folder / "a.txt")
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["trainer.epochs"] == "3" and run.data.params["trainer.optimizer.name"] == "adamw"
    assert len(run.data.params["long"]) == 6000 and run.data.params["p149"] == "149"
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "recall_at_10")][:2] == [(1, 0.5), (2, 0.6)]
    assert run.data.metrics["ranker/auc"] == 0.75
    assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"recipe.yaml", "folder", "a.txt"}
    assert artifacts.is_dir()

    with pytest.raises(RuntimeError), start_run(uri, artifacts, "quickstart", "second") as second:
        raise RuntimeError
    with pytest.raises(SystemExit), start_run(uri, artifacts, "quickstart", "third") as third:
        sys.exit(75)
    assert [client.get_run(t.run_id).info.status for t in (second, third)] == ["FAILED", "KILLED"]
    assert {client.get_run(t.run_id).info.experiment_id for t in (tracker, second, third)} == {run.info.experiment_id}
    MLflowTracker(uri, tracker.run_id).log_metrics({"later": 1.0}, 4)
    assert json.dumps(client.get_run(tracker.run_id).data.metrics["later"]) == "1.0"
