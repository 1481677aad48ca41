# SPDX-License-Identifier: Apache-2.0
"""A bundle as an MLflow model: ``mlflow.pyfunc.load_model("models:/recsys@champion").predict(frame)``, and ``mlflow models serve``.

::

    MLmodel                             names this module as the loader, the signature, and where the features are
    input_example.json  serving_input_example.json
    requirements.txt                    the libraries that wrote it; MLflow warns where others are installed
    bundle/                             the bundle as it is; nothing else is read, and nothing is unpickled

A row in is a request: ``user_id`` (string) and, for all rows or for none, ``k`` (integer, 10 by default) and ``request_time`` (string, ISO
8601 with an offset from UTC, now by default). A row out is its list: ``user_id``, ``item_ids`` and ``scores``, which the scoring
protocol writes as JSON arrays.

MLflow resolves an alias itself, without asking the promotion log: whoever must not serve a bundle that the log does not confirm loads it
by `recsys.registry.load`.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.bundle.bundle import Bundle
from recsys.bundle.golden import load_golden
from recsys.bundle.manifest import Manifest, verify
from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config, parse
from recsys.core.errors import BundleError
from recsys.core.files import write_bytes
from recsys.inference import golden
from recsys.inference.recommender import Recommender
from recsys.inference.request import InvalidRequest, Request
from recsys.ranking.mixers import fold_mixing
from recsys.registry.location import HOME, Location, home

if TYPE_CHECKING:
    import pandas as pd

BUNDLE, MLMODEL = "bundle", "MLmodel"
_DEFAULT_K = 10
_AT_ONCE = 64  # requests that are computed together


class Loading(Config):
    """What ``MLmodel`` tells the loader, and what the argument ``model_config`` of MLflow's `load_model` replaces.

    Attributes:
        bundle_sha256: of the bundle that was registered.
        features: where they are read from. Where RECSYS_HOME is set, it is the online store below that folder instead.
    """

    bundle_sha256: str
    features: component_config("feature_reader")  # type: ignore[valid-type]


class Scorer:
    """Answers frames of requests.

    Args:
        recommender: the bundle with its features.
    """

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender

    def predict(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        """One row for each row of ``frame``, in its order; see the module.

        Raises:
            MlflowException: a value is not what the signature asks for; the scoring server answers with status 400.
        """
        import pandas as pd
        from mlflow.exceptions import MlflowException

        try:
            requests = list(_requests(frame, self._recommender.view.count))
        except InvalidRequest as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        answers = []
        for start in range(0, len(requests), _AT_ONCE):
            answers += self._recommender.recommend(requests[start : start + _AT_ONCE])
        return pd.DataFrame(
            {
                "user_id": pd.Series([answer.user_id for answer in answers], dtype=object),
                "item_ids": pd.Series([[item.item_id for item in answer.items] for answer in answers], dtype=object),
                "scores": pd.Series([[item.score for item in answer.items] for answer in answers], dtype=object),
            }
        )


def _load_pyfunc(data_path: str, model_config: dict[str, Any] | None = None) -> Scorer:
    """What MLflow calls with the path of the bundle.

    Raises:
        BundleError: the bundle was changed, is not the one that was registered, or answers its recorded requests otherwise.
        FeatureStoreError: its features were not materialised.
    """
    loading = parse(Loading, model_config or {}, source=f"{MLMODEL}: model_config")
    bundle = Bundle.load(Path(data_path))
    if bundle.manifest.sha256 != loading.bundle_sha256:
        raise BundleError(f"{data_path}: sha256 {bundle.manifest.sha256}, but {loading.bundle_sha256} was registered: refused")
    fold_mixing(bundle.ranker)
    config = _reader(Location.under(home()), bundle.manifest) if HOME in os.environ else loading.features
    recommender = Recommender(bundle, components.build("feature_reader", config, bundle.features))
    golden.check(recommender)
    return Scorer(recommender)


def write_flavor(root: Path, bundle: Path, location: Location, run_id: str) -> None:
    """Write everything of the MLflow model but the bundle itself.

    Args:
        root: the model's directory, in which ``bundle`` is to stand beside what is written.
        bundle: where the bundle is now.
        location: whose online store holds its features.
        run_id: the MLflow run that the model belongs to.

    Raises:
        BundleError: the bundle is incomplete or was changed.
    """
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example  # what MLflow's own flavors call; there is no public one
    from mlflow.pyfunc import add_to_model
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    manifest, recorded = verify(bundle), load_golden(bundle)
    loading = Loading(bundle_sha256=manifest.sha256, features=_reader(location, manifest))
    words, numbers = Array(DataType.string), Array(DataType.double)
    optional = [ColSpec(DataType.long, "k", required=False), ColSpec(DataType.string, "request_time", required=False)]
    model = Model(
        artifact_path="models",
        run_id=run_id,
        utc_time_created=manifest.created.astimezone(UTC).replace(tzinfo=None),
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "user_id"), *optional]),
            outputs=Schema([ColSpec(DataType.string, "user_id"), ColSpec(words, "item_ids"), ColSpec(numbers, "scores")]),
        ),
        metadata={"bundle_sha256": manifest.sha256},
        model_size_bytes=sum(entry.bytes for entry in manifest.files.values()),
    )
    add_to_model(model, loader_module=__name__, data=BUNDLE, model_config=loading.model_dump(mode="json"))
    user, at = recorded.example if recorded else ("new-user", manifest.created)
    _save_example(model, pd.DataFrame({"user_id": [user], "k": [_DEFAULT_K], "request_time": [at.isoformat()]}), str(root))
    libraries = {name: version for name, version in manifest.environment.items() if name not in ("python", "machine")}
    write_bytes(root / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in libraries.items()).encode())
    model.save(str(root / MLMODEL))


def _reader(location: Location, manifest: Manifest) -> Config:
    """The reader of the online store that a bundle pins, at a location."""
    store = {"name": "sqlite", "path": str(location.online_store(manifest.feature_versions)), "read_only": True}
    cls: Any = components.get("feature_reader", "online")
    config: Config = parse(cls.Config, {"name": "online", "store": store}, source="online store")
    return config


def _requests(frame: "pd.DataFrame", longest: int) -> Iterator[Request]:
    """A request for each row; no list is longer than ``longest``."""
    now = datetime.now(UTC)
    users = frame["user_id"].tolist()
    lengths = frame["k"].tolist() if "k" in frame else [_DEFAULT_K] * len(users)
    times = frame["request_time"].tolist() if "request_time" in frame else [None] * len(users)
    for row, (user, k, at) in enumerate(zip(users, lengths, times, strict=True)):
        if not isinstance(user, str):
            raise InvalidRequest(f"user_id: row {row}: expected a string, got {user!r}")
        yield Request(user_id=str(user), k=min(int(k), longest), at=_time(at, row) or now)


def _time(value: Any, row: int) -> datetime | None:
    """A time of the frame; None where there is none."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            raise InvalidRequest(f"request_time: row {row}: expected a time as in ISO 8601, got {value!r}") from None
    return None
