# SPDX-License-Identifier: Apache-2.0
"""A bundle that answers, with all that belongs to it: its features, its titles, its popular list."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import pyarrow as pa

from feature_store.definitions import FeatureRepo
from feature_store.features import Age
from recsys.bundle.bundle import Bundle
from recsys.core.config import parse
from recsys.inference.features import FeatureReader
from recsys.inference.frame import USER_SERVICE
from recsys.inference.recommender import Recommender
from serving.engine.popular import Popular
from serving.engine.remembering import Memory, RememberingReader
from serving.events import Events


@dataclass(frozen=True, eq=False)
class Loaded:
    """See the module. Nothing in it changes; it is freed, and its store closed, when the last request that holds it has ended.

    Where the catalogue changes, another one takes its place, which shares its models, its store and its memory (`over`).

    Attributes:
        recommender: over the store.
        remembered: over the last features that the store gave, of users that ``memory`` knows.
        memory: these features.
        name: of the registered model.
        version: its version.
        sha256: the bundle's identity.
        features: the version of each feature service.
        titles: of items, where they have titles.
        sample: some users with a history, to try a bundle with.
        popular: the list for when nothing else can be had.
        ages: the features of a user that say how old the newest event is.
        events: where new events of users go; None where none are taken.
        applied: which changes of the catalogue it has, as whoever keeps it up with them notes it; None for none.
    """

    recommender: Recommender
    remembered: Recommender
    memory: Memory
    name: str
    version: int
    sha256: str
    features: dict[str, str]
    titles: dict[str, str]
    sample: tuple[str, ...]
    popular: Popular
    ages: tuple[str, ...]
    events: Events | None = None
    applied: object | None = None

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        reader: FeatureReader,
        *,
        name: str,
        version: int,
        sample: Sequence[str] = (),
        remembered_users: int = 10_000,
        close: Callable[[], None] | None = None,
        events: Events | None = None,
    ) -> Self:
        """A bundle over a reader of its features, which is asked for every item's popularity here; ``close`` is called when it is freed.

        Raises:
            RecsysError: the features cannot be read.
        """
        repo = parse(FeatureRepo, bundle.features, source="features.json")
        memory = Memory(remembered_users)
        recommender = Recommender(bundle, RememberingReader(reader, memory))
        loaded = cls(
            recommender=recommender,
            remembered=Recommender(bundle, memory),
            memory=memory,
            name=name,
            version=version,
            sha256=bundle.manifest.sha256,
            features=dict(bundle.manifest.feature_versions),
            titles=_titles(bundle.items),
            sample=tuple(sample),
            popular=Popular.of(recommender, repo),
            ages=tuple(f.name for view in repo.service(USER_SERVICE).views for f in repo.view(view).features if isinstance(f, Age)),
            events=events,
        )
        if close is not None:
            # The reader is what all that `over` makes of this one share.
            weakref.finalize(recommender.features, close)
        return loaded

    def over(self, bundle: Bundle, applied: object) -> Self:
        """This one over another state of its bundle's catalogue.

        Args:
            bundle: its own with other live bits, and perhaps with items behind those that it had.
            applied: see the attribute.
        """
        recommenders = []
        for own in (self.recommender, self.remembered):
            other = Recommender(bundle, own.features)
            other.ranker = own.ranker
            recommenders.append(other)
        before, count = self.recommender.view.count, recommenders[0].view.count
        return replace(
            self,
            recommender=recommenders[0],
            remembered=recommenders[1],
            titles=self.titles if count == before else {**self.titles, **_titles(bundle.items.slice(before))},
            popular=self.popular.extended(count),
            applied=applied,
        )

    @property
    def key(self) -> tuple[int, str]:
        """What tells bundles of one model apart."""
        return self.version, self.sha256


def _titles(items: pa.Table) -> dict[str, str]:
    if "title" not in items.column_names:
        return {}
    return dict(zip(items.column("item_id").to_pylist(), items.column("title").to_pylist(), strict=True))
