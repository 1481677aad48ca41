# SPDX-License-Identifier: Apache-2.0
"""The online reader as a component: whoever holds a bundle gets its features by a name, without importing the feature store."""

from collections.abc import Mapping
from typing import Any, Literal

from feature_store.definitions import FeatureRepo
from feature_store.online.reader import OnlineReader
from recsys.core import components
from recsys.core.components import component_config, register
from recsys.core.config import Config as BaseConfig
from recsys.core.config import parse


@register("feature_reader", "online")
class BundledReader(OnlineReader):
    """Features of a bundle's definitions, from an online store; see `OnlineReader`.

    Args:
        config: where the store is.
        definitions: what the bundle's ``features.json`` holds.

    Raises:
        ConfigError: the definitions are not such.
        FeatureStoreError: the store cannot be opened.
    """

    class Config(BaseConfig):
        """Where the features are.

        Attributes:
            store: the online store.
        """

        name: Literal["online"] = "online"
        store: component_config("online_store")  # type: ignore[valid-type]

    def __init__(self, config: Config, definitions: Mapping[str, Any]) -> None:
        super().__init__(parse(FeatureRepo, definitions, source="features.json"), components.build("online_store", config.store))
        self.config = config
