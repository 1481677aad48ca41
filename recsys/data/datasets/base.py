# SPDX-License-Identifier: Apache-2.0
"""What a component of the kind ``dataset`` offers."""

from typing import Protocol

from recsys.core.components import get
from recsys.core.config import Config
from recsys.data.dataset import Dataset


class DatasetSource(Protocol):
    """Somewhere a data set comes from. It is built as ``cls(config)`` and registered with ``@register("dataset", name)``."""

    def load(self) -> Dataset:
        """The data set in canonical form."""
        ...


def load_dataset(config: Config) -> Dataset:
    """The data set that a recipe's ``dataset`` section (a ``component_config("dataset")``) asks for.

    Raises:
        ComponentError: no data set has the configuration's ``name``.
        DataError: the data cannot be had, or breaks a rule.
    """
    source: DatasetSource = get("dataset", getattr(config, "name", type(config).__qualname__))(config)
    return source.load()
