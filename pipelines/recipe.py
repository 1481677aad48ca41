# SPDX-License-Identifier: Apache-2.0
"""The recipe of a whole run, from raw events to a promoted bundle."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from feature_store.definitions import FeatureRepo
from pipelines.checks.config import DataChecks
from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config, validate
from recsys.core.errors import ConfigError
from recsys.data.encoding.config import EncoderConfig
from recsys.data.windows import SequenceLoader
from recsys.ranking.calibration import NoCalibration, Undersampling
from recsys.registry.gates import Gate
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.catalogue import BeamIndex, check_pair
from recsys.retrieval.codes import ItemCodes
from recsys.retrieval.pretrained import pretrained_config
from recsys.text import ItemText
from recsys.training.trainer import Training


class Split(Config):
    """Shares of the events, by time: what is neither validation nor test is train."""

    valid: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.1, gt=0, lt=1)


class RankerRecipe(Config):
    """The ranker, its training, and its calibration.

    Attributes:
        model: the ranker.
        training: how it is trained.
        negatives: the share of the training events whose first task is 0 that is trained on, drawn by seed. Validation and test keep all of
            theirs, so that what is measured needs no weights.
        calibration: from its probabilities to those that are served and measured, fitted on the validation period: ``platt``,
            ``isotonic``, ``undersampling``, ``none``, or one of them ``per_group`` of a feature.
    """

    model: component_config("ranker")  # type: ignore[valid-type]
    training: Training
    negatives: float = Field(1.0, gt=0, le=1)
    calibration: component_config("calibration") = NoCalibration.Config()  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _undoes_sampling(self) -> Self:
        calibration = getattr(self.calibration, "base", self.calibration)
        if self.negatives < 1 and calibration.name == "none":
            raise ValueError(f"calibration: none, but negatives is {self.negatives:g}; expected undersampling, platt or isotonic")
        if isinstance(calibration, Undersampling.Config) and calibration.rate != self.negatives:
            raise ValueError(f"calibration.rate: expected the value of negatives, {self.negatives:g}, got {calibration.rate:g}")
        return self


class _Model(Config):
    model: component_config("retriever")  # type: ignore[valid-type]


class RetrieverRecipe(Config):
    """A retriever, how it sees histories in training, and its training.

    Attributes:
        model: the retriever; null for that of ``pretrained``, which then stands here.
        pretrained: a directory of `recsys pretrain`: the model over codes begins with its weights, and its item tokenizer comes with it.
        windows: how training histories are cut.
        training: how it is trained; null to use what is pretrained as it is.
    """

    model: component_config("retriever", optional=True) = None  # type: ignore[valid-type]
    pretrained: Path | None = None
    windows: SequenceLoader.Config = SequenceLoader.Config()
    training: Training | None

    @model_validator(mode="before")
    @classmethod
    def _model_of_the_directory(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("pretrained"), str | Path):
            return values
        directory = Path(values["pretrained"]).resolve()
        model, given = pretrained_config(directory)[0], values.get("model")
        if given is not None and validate(_Model, {"model": given}).model != model:
            raise ValueError("model: expected null, since the one of the directory is used")
        return values | {"model": model, "pretrained": directory}

    @model_validator(mode="after")
    def _comes_from_somewhere(self) -> Self:
        if self.model is None:
            raise ValueError("model: expected a retriever, or a directory in pretrained; got neither")
        if self.training is None and self.pretrained is None:
            raise ValueError("training: expected how to train, since nothing is pretrained; got null")
        return self


class Lists(Config):
    """How retrieved candidates become a list.

    Attributes:
        candidates: how many the retriever hands to the ranker.
        rank_weights: the values of λ among which the validation period chooses (see `recsys.inference.rules.combine`).
        betas: the weights of SETRec's semantic slots among which the validation period chooses.
        validation_steps: how many steps of the validation period, drawn by seed, the choice of λ looks at.
        history_feature: the user feature with the last item ids.
        seen_feature: the feature of the service ``seen`` with the ids not to be recommended again.
    """

    candidates: int = Field(100, ge=1)
    rank_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)
    betas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    validation_steps: int = Field(1000, ge=1)
    history_feature: str
    seen_feature: str


class Evaluation(Config):
    """How certain the figures are, and how explanations are tested; and which slices are measured besides those that every run has.

    Attributes:
        slices: columns of the interactions, the items or the users that hold one string each: every value is a slice named
            ``column=value``, such as ``domain=books``.
    """

    resamples: int = Field(1000, ge=100)
    level: float = Field(0.95, gt=0, lt=1)
    explained_requests: int = Field(200, ge=1)
    slices: tuple[str, ...] = ()


class Recipe(Config):
    """A whole run.

    Attributes:
        name: the recipe's name; runs stand below a folder of this name.
        model: the name under which the bundle is registered.
        seed: of every random choice.
        plugins: packages that register a user's own components.
        dataset: where events, items and users come from.
        checks: what the events of each day must be; null for no more than that they are in their day.
        split: by global time.
        features: sources, views and services of the feature store.
        encoder: from feature values to tensors.
        ranker: what scores candidates.
        text: item text for the semantic tokens.
        collaborative: the model whose item vectors become collaborative tokens; also the baseline that the retriever is compared with.
        codes: of items; null where no model reads them, or where they come with what is pretrained.
        retriever: what finds candidates.
        index: where it finds them.
        lists: how the two become one list.
        evaluation: intervals and tests.
        gates: what must hold before the bundle goes live.
        decisions: the folder of a decision log, whose decisions by the very bundle the parity gates compute again; null for none.
    """

    name: str
    model: str = "recsys"
    seed: int = 0
    plugins: tuple[str, ...] = ()
    dataset: component_config("dataset")  # type: ignore[valid-type]
    checks: DataChecks | None = None
    split: Split = Split()
    features: FeatureRepo
    encoder: EncoderConfig
    ranker: RankerRecipe
    text: ItemText
    collaborative: RetrieverRecipe
    codes: ItemCodes | None = None
    retriever: RetrieverRecipe
    index: component_config("index")  # type: ignore[valid-type]
    lists: Lists
    evaluation: Evaluation = Evaluation()
    gates: tuple[Gate, ...]
    decisions: Path | None = None

    @model_validator(mode="after")
    def _retriever_fits(self) -> Self:
        first, name = self.collaborative.model.name, self.retriever.model.name
        if first != "sasrec":
            raise ValueError(f"collaborative.model: expected sasrec, got {first!r}")
        if name == first:
            raise ValueError(f"retriever.model: {name!r} is the collaborative model, beside which the retriever is measured")
        retriever = components.get("retriever", name)
        reads, pretrained = retriever.reads_codes(self.retriever.model), self.retriever.pretrained is not None
        if pretrained and self.codes is not None:
            raise ValueError("codes: expected null, since the tokenizer comes with what is pretrained")
        if reads and not pretrained and self.codes is None:
            raise ValueError(f"codes: the retriever {name!r} reads codes of items; expected a tokenizer, got none")
        if not reads and self.codes is not None:
            raise ValueError(f"codes: the retriever {name!r} does not read codes; expected null")
        if issubclass(retriever, CodeRetriever) and retriever.equal_levels and self.codes and self.codes.repair == "suffix":
            raise ValueError(f"codes.repair: {name!r} wants levels of one size; expected keep or nearest_free, got 'suffix'")
        try:
            check_pair(retriever, components.get("index", self.index.name))
        except ConfigError as error:
            raise ValueError(f"index: {error}") from None
        widths = self.index.widths if isinstance(self.index, BeamIndex.Config) else None
        if widths is not None and (levels := self._levels()) is not None and len(widths) != levels:
            raise ValueError(f"index.widths: expected {levels}, one for each level of the codes, got {list(widths)}")
        return self

    def _levels(self) -> int | None:
        """How many codes an item has, where there are any."""
        if self.retriever.pretrained is not None:
            return pretrained_config(self.retriever.pretrained)[1]
        return None if self.codes is None else self.codes.levels
