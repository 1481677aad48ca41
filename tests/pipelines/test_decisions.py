# SPDX-License-Identifier: Apache-2.0
"""`recsys replay`, `recsys feedback` and `recsys forget`, and the way from served lists to the next training."""

import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import yaml

from feature_store.definitions import FeatureRepo
from feature_store.materialize import append, materialize
from feature_store.online import OnlineReader, SQLiteStore
from feature_store.served import ServedLog
from pipelines import cli
from pipelines.steps.features import feature_tables
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.core.tombstones import Tombstones
from recsys.data.datasets.synthetic import SCHEMA, Synthetic
from recsys.data.ingest import ingest_partitioned, read_dataset
from recsys.decisions.decision import Decision
from recsys.decisions.impressions import SCHEMA as IMPRESSIONS_SCHEMA
from recsys.inference.recommender import Recommender
from recsys.inference.request import Request
from recsys.registry import Location, Registry
from tests.pipelines.small import SMALL
from tests.recsys.decisions.simulation import WINDOW, emitted, log_decisions, simulate, write_events
from tests.recsys.decisions.test_feedback import content
from tests.recsys.decisions.test_replay import rank, recommend

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SECRET = "never-to-be-found"


@pytest.fixture
def home(tiny_run, tmp_path: Path) -> Path:
    """A copy of the registry and the online store, to be changed."""
    return Path(shutil.copytree(tiny_run.home, tmp_path / "home"))


def opened(home: Path) -> tuple[Bundle, FeatureRepo, SQLiteStore]:
    """A bundle of the home, its definitions, and the online store."""
    bundle, _ = Registry(Location.under(home)).load("models:/recsys@champion")
    store = SQLiteStore(SQLiteStore.Config(path=Location.under(home).online_store(bundle.manifest.feature_versions)))
    return bundle, parse(FeatureRepo, bundle.features, source="features.json"), store


def decided(recommender: Recommender, users: list[str]) -> list[Decision]:
    made = [recommend(recommender, [Request(user, 6, NOW)])[0] for user in users]
    return [*made, rank(recommender, Request(users[0], 6, NOW), ["3", "40", "7"])]


def test_replay_of_the_bundle_that_made_them(tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, repo, store = opened(tiny_run.home)
    given = decided(Recommender(bundle, OnlineReader(repo, store)), ["3", "30", "who?"])
    log_decisions(tmp_path / "log", [*given, replace(given[0], request_id="bare", evidence=None)], share=1.0)
    asked = ["replay", "--decisions", str(tmp_path / "log"), "--home", str(tiny_run.home), "--json", str(tmp_path / "report.json")]
    assert cli.main([*asked, "--tolerance", "0"]) == 0
    out = capsys.readouterr().out
    assert bundle.manifest.sha256[:12] in out and "not computed again: not_recorded 1" in out
    (report,) = json.loads((tmp_path / "report.json").read_text())["reports"]
    assert (report["decisions"], report["own"], report["exact"], report["overlap"]) == (4, 4, 4, 1.0)
    assert cli.main([*asked, "--model", "models:/recsys@champion", "--tolerance", "0"]) == 0

    rows = given[1].evidence.candidates.to_pylist()
    rows[0]["score"] += 0.5
    candidates = pa.Table.from_pylist(rows, schema=given[1].evidence.candidates.schema)
    log_decisions(
        tmp_path / "log", [replace(given[1], request_id="tampered", evidence=replace(given[1].evidence, candidates=candidates))], share=1.0
    )
    assert cli.main(asked) == 1
    assert "furthest apart: request tampered" in capsys.readouterr().out
    assert cli.main([*asked, "--tolerance", "0.6"]) == 0


def test_what_replay_refuses(tiny_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["replay", "--decisions", str(tmp_path / "log"), "--home", str(tiny_run.home)]
    assert cli.main(asked) == 2
    assert "expected the parts of a decision log with decisions, found none" in capsys.readouterr().err
    world = simulate(0)
    log_decisions(tmp_path / "log", world.decisions)
    assert cli.main(asked) == 2
    assert "version 1 is the bundle" in capsys.readouterr().err
    assert cli.main([*asked, "--model", "models:/recsys@champion"]) == 2
    assert "no decision could be computed again" in capsys.readouterr().err
    log_decisions(tmp_path / "other", [replace(each, version=None) for each in world.decisions])
    assert cli.main(["replay", "--decisions", str(tmp_path / "other"), "--home", str(tiny_run.home)]) == 2
    assert "the promotion log does not know the bundle" in capsys.readouterr().err


def feedback(folder: Path, *more: str) -> int:
    given = ["--decisions", str(folder / "log"), "--feedback", str(folder / "events.parquet"), "--window", str(WINDOW)]
    return cli.main(["feedback", *given, "--out", str(folder / "out"), *more])


def test_feedback_becomes_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = simulate(7)
    log_decisions(tmp_path / "log", world.decisions)
    write_events(tmp_path / "events.parquet", world.events)
    assert feedback(tmp_path, "--until", "2024-01-01T01:30:00Z", "--json", str(tmp_path / "report.json")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["counts"]["impressions"] == 31 * 5 and report["increment"].endswith("increment-000001")
    assert feedback(tmp_path) == 0 and feedback(tmp_path) == 0
    captured = capsys.readouterr()
    assert "nothing new up to" in captured.out and "recsys ingest --interactions" in captured.out
    pq.write_table(pa.table({"item_id": [str(n) for n in range(12)]}), tmp_path / "items.parquet")
    sources = ["--interactions", str(tmp_path / "out"), "--items", str(tmp_path / "items.parquet")]
    assert cli.main(["ingest", *sources, "--schema", str(tmp_path / "out" / "_schema.yaml"), "--out", str(tmp_path / "data")]) == 0
    rows = read_dataset(tmp_path / "data").interactions.to_pylist()
    assert {(row["request_id"], row["item_id"], row["shown_position"]): row["label"] for row in rows} == world.labels
    assert len(rows) == len(world.labels) and all(row["available_time"] - row["event_time"] == timedelta(seconds=WINDOW) for row in rows)


def test_what_feedback_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert feedback(tmp_path) == 2
    assert "--decisions" in capsys.readouterr().err
    (tmp_path / "log").mkdir()
    assert feedback(tmp_path) == 2
    assert "events.parquet" in capsys.readouterr().err
    write_events(tmp_path / "events.parquet", [])
    for wrong in ("tomorrow", "2024-01-01T00:00:00"):
        assert feedback(tmp_path, "--until", wrong) == 2
        assert f"--until: expected {'an offset' if wrong[0] == '2' else 'a time such as'}" in capsys.readouterr().err


@pytest.mark.slow
def test_served_lists_train_the_next_ranker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clicks by position on lists of the planted data set, through the log, the join and ingest into a ranker's step."""
    base = Synthetic(Synthetic.Config()).load()
    world = simulate(8, requests=600, items=60, places=6, users=40)
    users = {f"user {n}": str(n) for n in range(40)}
    log_decisions(tmp_path / "log", [replace(each, user_id=users[each.user_id]) for each in world.decisions])
    write_events(tmp_path / "events.parquet", world.events)
    assert feedback(tmp_path) == 0
    for name in ("items", "users"):
        pq.write_table(getattr(base, name), tmp_path / f"{name}.parquet")
    interactions = IMPRESSIONS_SCHEMA.model_dump(mode="json", exclude_defaults=True)["interactions"]
    interactions["values"] = [{"name": "rating", "kind": "label", "source": "label"}, *interactions["values"][1:3]]
    roles = SCHEMA.model_dump(mode="json", exclude_defaults=True) | {"interactions": interactions}
    roles["items"]["attributes"][2].pop("separator")
    (tmp_path / "roles.yaml").write_text(yaml.safe_dump(roles))
    sources = [part for name in ("items", "users") for part in (f"--{name}", str(tmp_path / f"{name}.parquet"))]
    schema = ["--schema", str(tmp_path / "roles.yaml"), "--out", str(tmp_path / "data")]
    assert cli.main(["ingest", "--interactions", str(tmp_path / "out"), *sources, *schema]) == 0
    assert read_dataset(tmp_path / "data").interactions.num_rows == len(world.labels) == emitted(tmp_path / "out").num_rows
    capsys.readouterr()
    changes = (
        f"dataset={{name: ingested, path: {tmp_path / 'data'}}}",
        *SMALL[1:],
        "encoder.tasks=[{name: like, feature: rating, threshold: '>= 1'}]",
        "checks={columns: {rating: {type: number, low: 0, high: 2, nulls: 0}}, dropped: 0.05}",
    )
    sets = [part for change in changes for part in ("--set", change)]
    assert cli.main(["train", "quickstart", "--home", str(tmp_path / "home"), *sets]) == 0
    found = re.search(r"^ranker: (/.*)$", capsys.readouterr().out, re.M)
    assert found is not None and (Path(found[1]) / "scores.safetensors").is_file()


# --- forget


def texts(path: Path) -> str:
    """Everything that a Parquet file holds, decoded, streams in its columns and its footer included."""
    with pq.ParquetFile(path) as file:
        table, footer = file.read(), repr(file.metadata) + repr(file.schema_arrow.metadata)
    streams = [value.as_py() for name in ("user", "items") if name in table.column_names for value in table.column(name)]
    decoded = [repr(pa.ipc.open_stream(value).read_all().to_pydict()) for value in streams if isinstance(value, bytes)]
    return footer + repr(table.to_pydict()) + "".join(decoded)


def holders(*places: Path) -> set[str]:
    """The names of the files that hold the secret: of Parquet in what is decoded, of all else in the bytes."""
    found = set()
    for path in (each for place in places for each in place.rglob("*") if each.is_file()):
        held = SECRET in texts(path) if path.suffix == ".parquet" else SECRET.encode() in path.read_bytes()
        if held or SECRET in path.name:
            found.add(path.name if path.suffix != ".parquet" else path.parent.name)
    return found


def planted(home: Path, folder: Path) -> tuple[FeatureRepo, dict[str, Any]]:
    """The secret user everywhere; and what `materialize` is given when the events come again."""
    bundle, repo, store = opened(home)
    base = Synthetic(Synthetic.Config()).load()
    events, users = base.interactions, base.users
    mine = pc.equal(events.column("user_id"), "11")
    events = events.set_column(0, "user_id", pc.if_else(mine, SECRET, events.column("user_id")))
    users = users.set_column(0, "user_id", pc.if_else(pc.equal(users.column("user_id"), "11"), SECRET, users.column("user_id")))
    tables = feature_tables(repo, base) | {"interactions": events, "users": users}
    materialize(repo, tables, store, full=True)

    served = ServedLog(folder / "served", repo, share=1.0)
    reader = OnlineReader(repo, store)
    spine = pa.table({"user_id": [SECRET, "3"], "request_time": pa.array([NOW, NOW], pa.timestamp("us", tz="UTC"))})
    for service in ("user", "seen"):
        served.offer(service, reader.read(service, spine))
    served.close()
    given = decided(Recommender(bundle, reader), [SECRET, "3"])
    log_decisions(folder / "log", given, share=1.0)
    clicks = [
        {
            "request_id": each.request_id,
            "item_id": each.shown.column("item_id")[0].as_py(),
            "event_time": NOW,
            "kind": "click",
            "label": 1.0,
        }
        for each in given
    ]
    write_events(folder / "events.parquet", clicks)
    assert feedback(folder, "--until", (NOW + timedelta(days=1)).isoformat()) == 0
    for name, table in (("clicks", events), ("items", base.items), ("users", users)):
        pq.write_table(table, folder / f"{name}.parquet")
    roles = SCHEMA.model_dump(mode="json")
    roles["interactions"]["event_time"] = "event_time"
    roles["items"]["attributes"][2]["separator"] = None
    sources = [folder / f"{name}.parquet" for name in ("clicks", "items", "users")]
    ingest_partitioned(*sources, type(SCHEMA).model_validate(roles), folder / "data", partitions=3)
    store.close()
    return repo, tables


def forget(home: Path, folder: Path, *more: str) -> int:
    places = ["--decisions", str(folder / "log"), "--served", str(folder / "served"), "--feedback", str(folder / "out")]
    report = ["--json", str(folder / "report.json")]
    return cli.main(["forget", SECRET, "--home", str(home), *places, "--events", str(folder / "data"), *report, *more])


def test_a_user_is_forgotten_everywhere(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data of a server"
    folder.mkdir()
    repo, tables = planted(home, folder)
    places = (home / "online", *(folder / name for name in ("log", "served", "out", "data")))
    assert len(holders(*places)) >= 5
    assert forget(home, folder) == 0
    out = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    rows = {name.split(" ")[0]: count for name, count in report["rows"].items()}
    assert report["tombstone"] and rows == {"online": 3, "impressions": 11, "decisions": 2, "served": 2, "interactions": 30, "users": 1}
    assert "a tombstone keeps the user away from now on" in out and SECRET not in out
    assert holders(*places) == set()
    assert SECRET not in (home / "forgotten.json").read_text()

    others = read_dataset(folder / "data")
    assert others.interactions.num_rows == tables["interactions"].num_rows - 30
    assert cli.main(["replay", "--decisions", str(folder / "log"), "--home", str(home), "--tolerance", "0"]) == 0

    before = {name: each for name, each in content(folder).items() if name != "report.json"}
    assert forget(home, folder) == 0
    report = json.loads((folder / "report.json").read_text())
    assert set(report["rows"].values()) == {0} and not report["tombstone"]
    assert {name: each for name, each in content(folder).items() if name != "report.json"} == before

    # The events come again from outside.
    _, _, store = opened(home)
    stones = Tombstones.under(home)
    materialize(repo, tables, store, full=True, forgotten=stones)
    append(repo, "interactions", tables["interactions"], store, forgotten=stones)
    store.close()
    assert holders(home / "online") == set()


def test_what_forget_refuses(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["forget", SECRET, "--home", str(home), "--decisions", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert cli.main(["forget", "", "--home", str(home)]) == 2
    assert "USER: expected an id" in capsys.readouterr().err
    assert cli.main(["forget", SECRET, "--home", str(home), "--store", "redis"]) == 2
    assert "--store: expected a mapping such as {name: redis, url: ...}, got 'redis'" in capsys.readouterr().err
    for path in home.rglob("features.json"):
        path.unlink()
    assert cli.main(["forget", SECRET, "--home", str(home)]) == 2
    assert "no known definition explains view" in capsys.readouterr().err
    # The recipe says it as well.
    assert cli.main(["forget", SECRET, "--home", str(home), "--recipe", "quickstart"]) == 0
