# SPDX-License-Identifier: Apache-2.0
"""Which items there are, and the best of them for a user: the catalogue and the indexes over it."""

from typing import Any, get_type_hints

from recsys.core.errors import ConfigError
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue.dense import DenseIndex
from recsys.retrieval.catalogue.live import Catalogue, CatalogueView, Version

__all__ = ["Catalogue", "CatalogueView", "DenseIndex", "Version", "check_pair"]


def check_pair(retriever: Retriever | type[Retriever], index: Any) -> None:
    """Hold that an index accepts the user state that a retriever gives, which is what its `Retriever.encode` is annotated to return.

    Args:
        retriever: a retriever or its class.
        index: an index or its class, with the attribute ``accepts``.

    Raises:
        ConfigError: it does not; names the retriever, the index and both states.
    """
    retriever_class = retriever if isinstance(retriever, type) else type(retriever)
    index_class: Any = index if isinstance(index, type) else type(index)
    given = get_type_hints(retriever_class.encode)["return"]
    if not (isinstance(given, type) and issubclass(given, index_class.accepts)):
        raise ConfigError(
            f"retriever {_name(retriever_class)} gives {getattr(given, '__name__', given)}, "
            f"but index {_name(index_class)} accepts {index_class.accepts.__name__}"
        )


def _name(component: type) -> str:
    """The name that a recipe uses for a component, or its class's where it has none."""
    config = getattr(component, "Config", None)
    return repr(config.model_fields["name"].default) if config is not None else component.__name__
