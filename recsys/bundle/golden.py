# SPDX-License-Identifier: Apache-2.0
"""Recorded requests that travel with a bundle, with the features that they were answered from and the lists that they got.

``golden.json`` holds requests and lists, ``golden/<service>.arrow`` the features. A host that loads the bundle answers them again
(`recsys.inference.golden.check`) and so knows that it computes what the bundle's maker computed.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import pyarrow as pa
from pydantic import AwareDatetime, Field, FiniteFloat

from recsys.bundle.tables import read_table, write_table
from recsys.core.config import Config, parse
from recsys.core.files import read_json, write_json

_REQUESTS, _FEATURES = "golden.json", "golden"


class Recorded(Config):
    """A request and its list.

    Attributes:
        user_id: who asked.
        k: how many items were asked for.
        at: when.
        item_ids: what was recommended, best first.
        scores: float32 values, written so that they come back to the bit.
    """

    user_id: str
    k: Annotated[int, Field(ge=1)]
    at: AwareDatetime
    item_ids: tuple[str, ...]
    scores: tuple[FiniteFloat, ...]


class _File(Config):
    requests: tuple[Recorded, ...]
    services: tuple[str, ...]


@dataclass(frozen=True)
class Golden:
    """Requests, lists and features.

    Attributes:
        requests: what was asked and answered.
        features: for each feature service the rows that it gave: its entity's key, ``request_time``, values and statuses.
    """

    requests: tuple[Recorded, ...]
    features: dict[str, pa.Table]

    @property
    def example(self) -> tuple[str, datetime]:
        """The user and the time of the first request."""
        return self.requests[0].user_id, self.requests[0].at

    def save(self, root: Path) -> None:
        """Write it into a bundle's directory."""
        content = _File(requests=self.requests, services=tuple(self.features))
        write_json(root / _REQUESTS, content.model_dump(mode="json"))
        (root / _FEATURES).mkdir()
        for service, table in self.features.items():
            write_table(root / _FEATURES / f"{service}.arrow", table)


def load_golden(root: Path) -> Golden | None:
    """What `Golden.save` wrote; None in a bundle without it.

    Raises:
        ConfigError: the file has another form.
    """
    path = root / _REQUESTS
    if not path.is_file():
        return None
    content = parse(_File, read_json(path), source=str(path))
    return Golden(content.requests, {service: read_table(root / _FEATURES / f"{service}.arrow") for service in content.services})
