# SPDX-License-Identifier: Apache-2.0
"""`recsys forget USER`: erase a user from the online stores and from the logs and data sets that are named."""

import argparse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from feature_store.definitions import FeatureRepo
from feature_store.forget import forget_online, forget_served
from feature_store.online import OnlineStore, SQLiteStore
from recsys.core.components import get
from recsys.core.config import load_recipe, parse, recipe_names
from recsys.core.errors import ConfigError, DataError
from recsys.core.files import read_json, write_json
from recsys.core.schema import USER
from recsys.core.tombstones import Tombstones
from recsys.data.ingest.forget import forget_user
from recsys.decisions.forget import forget_decisions, forget_impressions
from recsys.registry.location import Location, home


@dataclass
class Erased:
    """What was found and removed.

    Attributes:
        rows: by place and what it holds: how many.
        keep: views, by store, that hold ids of users among the values of other entities.
    """

    rows: dict[str, int] = field(default_factory=dict)
    keep: dict[str, tuple[str, ...]] = field(default_factory=dict)


def main(argv: list[str]) -> int:
    """The command; the status is 1 where something still holds the user, and the output says what to do."""
    arguments = _options().parse_args(argv)
    if not arguments.user:
        raise ConfigError("forget: USER: expected an id, got ''")
    for folder in (*arguments.decisions, *arguments.served, *arguments.feedback, *arguments.events):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    # The tombstone comes first, so that nothing that runs meanwhile brings the user back.
    new = Tombstones.under(arguments.home).add(arguments.user)
    erased = erase(arguments)
    if arguments.json is not None:
        write_json(arguments.json, {"tombstone": new, "rows": erased.rows, "keep": {name: list(v) for name, v in erased.keep.items()}})
    print_erased(Console(), erased, new)
    return int(bool(erased.keep))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recsys forget", description="Erase a user. Run it again once servers have written what they hold."
    )
    parser.add_argument("user", metavar="USER", help="the user's id")
    parser.add_argument("--home", type=Path, default=home(), help="the folder of registry and online stores (RECSYS_HOME)")
    folders = {
        "decisions": "the parts of a decision log",
        "served": "the parts of a served log",
        "feedback": "the impressions of recsys feedback",
        "events": "a data set of recsys ingest",
    }
    for name, what in folders.items():
        parser.add_argument(f"--{name}", type=Path, action="append", default=[], metavar="DIRECTORY", help=f"{what}; may be repeated")
    store = "a further online store, as {name: redis, url: ...}; may be repeated"
    parser.add_argument("--store", action="append", default=[], metavar="YAML", help=store)
    recipe = (
        f"whose features explain stores and logs that no bundle under --home explains: one of {', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_argument("--recipe", action="append", default=[], help=recipe)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was found there, too")
    return parser


def erase(arguments: argparse.Namespace) -> Erased:
    """Erase the user from everything that is named."""
    user, erased = arguments.user, Erased()
    repos = definitions(arguments.home, arguments.recipe)
    for name, opened in _stores(arguments.home, arguments.store):
        with closing(opened) as store:
            found = forget_online(store, repos, USER, user, what=f"online store {name}")
        erased.rows[f"online store {name}"] = len(found.views)
        if found.keep:
            erased.keep[name] = found.keep
    # Feedback first: while it waits, only the decisions say whose it is.
    for folder in arguments.feedback:
        erased.rows[f"impressions {folder}"] = sum(
            forget_impressions(folder, decisions, user) for decisions in (arguments.decisions or [None])
        )
    for folder in arguments.decisions:
        erased.rows[f"decisions {folder}"] = forget_decisions(folder, user)
    for folder in arguments.served:
        erased.rows[f"served log {folder}"] = forget_served(folder, repos, USER, user)
    for folder in arguments.events:
        for table, rows in forget_user(folder, user).items():
            erased.rows[f"{table} of {folder}"] = rows
    return erased


def definitions(folder: Path, recipes: list[str]) -> list[FeatureRepo]:
    """The feature definitions of every bundle below a folder, and those of some recipes."""
    contents = {path.read_text(encoding="utf-8"): path for path in sorted(folder.rglob("features.json"))}
    found = [parse(FeatureRepo, read_json(path), source=str(path)) for path in contents.values()]
    if recipes:
        from pipelines.recipe import Recipe

        found += [load_recipe(Recipe, recipe).features for recipe in recipes]
    return found


def _stores(folder: Path, given: list[str]) -> Iterator[tuple[str, OnlineStore]]:
    """The embedded online stores under a folder, and those that are given; each is opened when it is its turn."""
    for path in sorted(Location.under(folder).online.glob("*.sqlite")):
        yield str(path), SQLiteStore(SQLiteStore.Config(path=path))
    for text in given:
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:
            content = None
        if not isinstance(content, dict) or "name" not in content:
            raise ConfigError(f"--store: expected a mapping such as {{name: redis, url: ...}}, got {text!r}")
        cls = get("online_store", content["name"])
        yield text, cls(parse(cls.Config, content, source="--store"))


def print_erased(console: Console, erased: Erased, new: bool) -> None:
    """What was found, place by place; it is there no longer."""
    table = Table("found and removed in", "rows", box=None, header_style="dim")
    for place, rows in erased.rows.items():
        table.add_row(Text(place), f"{rows:,}", style="" if rows else "dim")
    console.print(table)
    console.print("a tombstone keeps the user away from now on" if new else "the user had a tombstone already")
    for store, views in erased.keep.items():
        names = ", ".join(views)
        console.print(
            Text(f"{store}: {names}: ids of users are values there; materialise in full from data without the user"), soft_wrap=True
        )
