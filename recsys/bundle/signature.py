# SPDX-License-Identifier: Apache-2.0
"""What clients of a bundle send and get, read off its feature definitions: another bundle may take its place where this stays."""

from collections.abc import Mapping, Sequence
from typing import Any

from recsys.core.config import Config

ITEM_ID = "string"
"""The type of every item id: a catalogue holds no other (`recsys.retrieval.catalogue.live`)."""


class Signature(Config):
    """The contract of a bundle with its clients.

    Attributes:
        tasks: what the ranker predicts.
        services: each feature service with its entity's key.
        request: each column that features of the request are made of, with its type.
        item_id: the type of item ids.
    """

    tasks: tuple[str, ...]
    services: dict[str, str]
    request: dict[str, str]
    item_id: str


def signature_of(features: Mapping[str, Any], tasks: Sequence[str]) -> Signature:
    """The signature of a bundle.

    Args:
        features: its feature definitions, as ``features.json`` holds them.
        tasks: of its encoder.
    """
    views = {view["name"]: view for view in features.get("views", ())}
    asked = {source["name"] for source in features.get("sources", ()) if source["kind"] == "request"}
    columns = {
        feature["column"]: _type(feature)
        for view in views.values()
        if view["source"] in asked
        for feature in view["features"]
        if feature["kind"] == "attribute"
    }
    services = {service["name"]: views[service["views"][0]]["entity"] for service in features.get("services", ())}
    return Signature(tasks=tuple(tasks), services=services, request=columns, item_id=ITEM_ID)


def _type(feature: Mapping[str, Any]) -> str:
    """The type of an attribute's column: what it means, and what its values are where that does not follow from it."""
    return feature["type"] if feature.get("dtype") is None else f"{feature['type']} of {feature['dtype']}"
