# SPDX-License-Identifier: Apache-2.0
"""How every model of the grid is trained, and over which points it is tuned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Plan:
    """How a model is trained.

    Attributes:
        model: its configuration.
        points: what is tuned: dotted keys of the cell's configuration and their values, one mapping for each point.
        windows: of the histories.
        training: batch size, and the trainer's configuration.
        text: the encoder whose embeddings of the items' text it reads, see `benchmarks.retrieval_quality.items.ENCODERS`; null for none.
        codes: the item tokenizer, ``repair`` and ``suffix_size`` of the codes it reads; null for none.
        collaborative: the model of the grid whose item vectors it reads, tuned and trained with the same seed; null for none.
        index: by whose lists it is ranked, where the scores of all items would cost too much; null to rank among all items.
        validation: how many steps, drawn by seed, each epoch is validated on; null for all.
        betas: the weights of SETRec's semantic slots among which validation chooses after training.
        elsewhere: the points of data sets that want others.
    """

    model: Mapping[str, Any]
    points: Sequence[Mapping[str, Any]]
    windows: Mapping[str, Any]
    training: Mapping[str, Any]
    text: str | None = None
    codes: Mapping[str, Any] | None = None
    collaborative: str | None = None
    index: Mapping[str, Any] | None = None
    validation: int | None = None
    betas: Sequence[float] = ()
    elsewhere: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def points_on(self, data: str) -> Sequence[Mapping[str, Any]]:
        """What is tuned on a data set."""
        return self.elsewhere.get(data, self.points)


def training(batch_size: int, epochs: int, rate: float, patience: int, decay: float = 0.01) -> dict[str, Any]:
    """AdamW in float32, stopped by NDCG@10 on validation."""
    trainer = {"epochs": epochs, "optimizer": {"name": "adamw", "learning_rate": rate, "weight_decay": decay}, "precision": "fp32"}
    return {"batch_size": batch_size, "trainer": trainer | {"monitor": {"metric": "ndcg@10", "mode": "max", "patience": patience}}}


_SMALL = {"dim": 64, "blocks": 2, "heads": 2}
_PLAIN = {"model.dropout": 0.5}
_COSINE = {"training.trainer.schedule": {"name": "cosine", "warmup_steps": 200}}
# MovieLens-1M has 4% of its pairs of user and film, Beauty .07%: less has to be left to chance.
_LONG = {"model.dropout": 0.2, "training.batch_size": 64, "training.trainer.epochs": 40, **_COSINE}
_SETREC = _SMALL | {"warm_start": True, "semantic_tokens": 4, "beta": 0.1, "negatives": 2048}
# At SASRec's own rate the transformer forgets what it began with (docs/results/retrieval.md).
_SLOWER = (
    {"training.trainer.optimizer.learning_rate": 3e-4, "model.dropout": 0.2},
    {"training.trainer.optimizer.learning_rate": 5e-4, "model.dropout": 0.3, "model.semantic_tokens": 2, **_COSINE},
)
_BETAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_FSQ = {"tokenizer": {"name": "fsq", "slots": 4, "levels": [8, 8, 8, 6, 5], "epochs": 100, "learning_rate": 1e-3}, "repair": "keep"}
_OPQ = {"tokenizer": {"name": "opq", "slots": 32, "dim": 192}, "repair": "keep"}
_KMEANS = {"tokenizer": {"name": "residual_kmeans", "levels": 3, "codes": 256, "normalize": True}, "repair": "suffix", "suffix_size": 256}
_WINDOWS = {"stride": 50, "alike": True}

_SET = Plan(
    _SETREC,
    _SLOWER,
    _WINDOWS,
    training(128, 30, 1e-3, 4),
    text="minilm",
    collaborative="sasrec",
    betas=_BETAS,
    validation=8000,
)

PLANS: Mapping[str, Plan] = {
    "sasrec": Plan(_SMALL, (_PLAIN,), _WINDOWS, training(128, 60, 1e-3, 5), elsewhere={"ml_1m": (_PLAIN, _LONG)}),
    "hstu": Plan(_SMALL, (_PLAIN,), _WINDOWS, training(128, 60, 1e-3, 5), elsewhere={"ml_1m": (_LONG,)}),
    "setrec": _SET,
    # The point that Beauty chose: what new items inherit has no say in training, where there are none.
    "setrec_inherit": replace(_SET, model={**_SETREC, "inherit": {}}, points=_SLOWER[1:]),
    "setrec_fsq": replace(_SET, model={**_SETREC, "semantic": "codes", "code_digits": [8, 8, 8, 6, 5]}, codes=_FSQ),
    "rpg": Plan(
        {"dim": 256, "blocks": 2, "heads": 4, "dropout": 0.5},
        ({"training.trainer.optimizer.learning_rate": 3e-3, "training.trainer.precision": "bf16", **_COSINE},),
        _WINDOWS,
        training(256, 100, 1e-3, 10),
        text="minilm",
        codes=_OPQ,
        validation=4000,
    ),
    "tiger": Plan(
        {},
        ({"training.trainer.optimizer.learning_rate": 2e-3},),
        {"stride": 20, "alike": True},
        training(256, 40, 1e-3, 4),
        text="minilm",
        codes=_KMEANS,
        index={"name": "beam", "width": 20},
        validation=2000,
    ),
    "recgpt": Plan(
        {"dim": 192, "blocks": 3, "heads": 6, "dropout": 0.2, "max_length": 50},
        ({"training.trainer.optimizer.learning_rate": 1e-3},),
        _WINDOWS,
        training(256, 30, 1e-3, 4),
        text="minilm",
        codes=_FSQ,
        validation=4000,
    ),
}
LENGTHS = {"ml_1m": 200}  # of histories, as the marks of the literature have it; 50 elsewhere
