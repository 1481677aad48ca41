# SPDX-License-Identifier: Apache-2.0
"""The champion on the candidate's test events."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from feature_store.definitions import FeatureRepo
from feature_store.offline import OfflineReader
from pipelines.steps import lists
from pipelines.steps.histories import Histories
from recsys.core.config import parse
from recsys.core.errors import RegistryError
from recsys.evaluation.metrics.ranking import ndcg_at
from recsys.inference.recommender import Recommender
from recsys.registry import Registry


def champion_list(registry: Registry, model: str, tables: Mapping[str, pa.Table], histories: Histories) -> np.ndarray:
    """NDCG@10 of the champion's own list for every test event, with its own features, models and λ.

    Raises:
        RegistryError: the champion's catalogue is another one, so that its rows mean other items.
    """
    bundle, version = registry.load(f"models:/{model}@champion")
    if bundle.catalogue.snapshot().ids_digest != histories.catalogue.snapshot().ids_digest:
        raise RegistryError(f"{model}: champion {version} has another catalogue than the candidate; compare them on a common one")
    repo = parse(FeatureRepo, bundle.features, source="features.json")
    recommender = Recommender(bundle, OfflineReader(repo, tables))
    served = lists.retrieve(recommender, histories.test, "champion, test")
    return ndcg_at(lists.list_ranks(served, histories.test, bundle.settings.rank_weight), 10)
