# SPDX-License-Identifier: Apache-2.0
"""A real bundle and its real online store."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from feature_store.definitions import FeatureRepo
from feature_store.online import OnlineReader, SQLiteStore
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.inference.features import FeatureReader
from recsys.registry import Location
from serving.engine import Loaded
from tests.serving.support import KNOWN, Faulty


@pytest.fixture(scope="session")
def bundle(tiny_run) -> Bundle:
    return Bundle.load(tiny_run.directory / "bundle")


@pytest.fixture(scope="session")
def online(bundle: Bundle, tiny_run) -> OnlineReader:
    store = SQLiteStore.open(Location.under(tiny_run.home).online_store(bundle.manifest.feature_versions))
    return OnlineReader(parse(FeatureRepo, bundle.features, source="features.json"), store)


@pytest.fixture
def faulty(online: OnlineReader) -> Faulty:
    return Faulty(online)


@pytest.fixture
def load(bundle: Bundle, online: OnlineReader) -> Callable[..., Loaded]:
    """Loads the bundle as a version; with another ``rank_weight`` it is another bundle, whose scores are others."""

    def load(version: int = 1, reader: FeatureReader | None = None, rank_weight: float | None = None) -> Loaded:
        own = bundle
        if rank_weight is not None:
            manifest = bundle.manifest.model_copy(update={"seed": version})
            settings = bundle.settings.model_copy(update={"rank_weight": rank_weight})
            # What was recorded of the bundle is not what this one answers.
            own = replace(bundle, manifest=manifest, settings=settings, golden=None)
        return Loaded.of(own, reader or online, name="recsys", version=version, sample=KNOWN[:2])

    return load
