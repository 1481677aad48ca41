# SPDX-License-Identifier: Apache-2.0
"""Which items there are, and the best of them for a user: the catalogue and the indexes over it."""

from pathlib import Path
from typing import get_type_hints

from recsys.core import components
from recsys.core.errors import BundleError, ComponentError, ConfigError
from recsys.core.files import read_json
from recsys.retrieval.base import Retriever
from recsys.retrieval.catalogue.approximate import HNSWIndex, IVFIndex
from recsys.retrieval.catalogue.beam import BeamIndex
from recsys.retrieval.catalogue.code_index import CodeIndex
from recsys.retrieval.catalogue.dense import DenseIndex
from recsys.retrieval.catalogue.gather import GatherIndex
from recsys.retrieval.catalogue.index import INDEX_FILE, Index, IndexMeta
from recsys.retrieval.catalogue.live import Catalogue, CatalogueView, Version

__all__ = [
    "BeamIndex",
    "Catalogue",
    "CatalogueView",
    "CodeIndex",
    "DenseIndex",
    "GatherIndex",
    "HNSWIndex",
    "IVFIndex",
    "Index",
    "IndexMeta",
    "Version",
    "check_pair",
    "load_index",
]


def check_pair(retriever: Retriever | type[Retriever], index: Index | type[Index]) -> None:
    """Hold that an index accepts the user state that a retriever gives, which is what its `Retriever.encode` is annotated to return.

    Args:
        retriever: a retriever or its class.
        index: an index or its class.

    Raises:
        ConfigError: it does not; names the retriever, the index and both states.
    """
    retriever_class = retriever if isinstance(retriever, type) else type(retriever)
    index_class = index if isinstance(index, type) else type(index)
    given = get_type_hints(retriever_class.encode)["return"]
    if not (isinstance(given, type) and issubclass(given, index_class.accepts)):
        raise ConfigError(
            f"retriever {_name(retriever_class)} gives {getattr(given, '__name__', given)}, "
            f"but index {_name(index_class)} accepts {' or '.join(state.__name__ for state in index_class.accepts)}"
        )


def load_index(directory: Path, view: CatalogueView, *, mmap: bool = False) -> Index:
    """Read an index of whatever class; see `Index.load`.

    Raises:
        BundleError: it names no known class; or see `Index.load`.
    """
    try:
        name = str(read_json(directory / INDEX_FILE)["config"]["name"])
        cls: type[Index] = components.get("index", name)
    except (OSError, ValueError, KeyError, TypeError, ComponentError) as error:
        raise BundleError(f"{directory}: cannot read the index: {error}") from None
    return cls.load(directory, view, mmap=mmap)


def _name(component: type) -> str:
    """The name that a recipe uses for a component, or its class's where it has none."""
    config = getattr(component, "Config", None)
    return repr(config.model_fields["name"].default) if config is not None else component.__name__
