# SPDX-License-Identifier: Apache-2.0
"""What a retriever can be told to save: the recipe's key ``efficiency`` of a retriever."""

from typing import Literal, TypeVar

from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import component_config
from recsys.core.config import Config as BaseConfig
from recsys.data.batch import SequenceBatch
from recsys.efficiency.history import HistoryPruning
from recsys.efficiency.schedule import PruneSchedule
from recsys.efficiency.view import TokenView


class DraftConfig(BaseConfig):
    """Token Recycling, see `recsys.efficiency.decoding.token_recycling.AdjacencyDraft`.

    Attributes:
        successors: k, how many likely successors of each code are remembered.
        level_sizes: nodes of the drafted tree, level by level.
    """

    successors: int = Field(8, ge=1)
    level_sizes: tuple[int, ...] = (8, 16)


class RoutingConfig(BaseConfig):
    """Informed Routing of feed-forward networks, trained along with the model; see `recsys.retrieval.routed.RoutedNetworks`.

    Attributes:
        budget: the share of the tokens, over all blocks together, for which a network computes; the others get a forecast of its update.
        rank: of the forecasters; null for ``max(8, dim // 40)``.
        activation: of the forecasters.
        hidden: width of the routers' hidden layer; 0 for linear ones.
        weight: of the penalty on a share that is not the budget's.
        forecast_weight: of the forecasters' loss.
    """

    budget: float = Field(0.6, gt=0.0, le=1.0)
    rank: int | None = Field(None, ge=1)
    activation: Literal["silu", "none"] = "silu"
    hidden: int = Field(16, ge=0)
    weight: float = Field(8.0, ge=0.0)
    forecast_weight: float = Field(1.0, ge=0.0)


class RetrieverEfficiency(BaseConfig):
    """How a retriever spends less; every part is optional.

    Attributes:
        history: which events of a history the model reads when it is asked for a state. Training reads its windows whole.
        attention: in the place of fused attention, in training too; for models with a `CausalTransformer`.
        schedule: which events go on from layer to layer when the model is asked for a state. TIGER's are those of its encoder.
        routing: for which tokens feed-forward networks compute, in training too; for models with a `CausalTransformer`. It has weights of
            its own, so a model has it from the beginning or not at all.
        drafts: what decoding guesses ahead, for models that generate codes one after another (TIGER).
    """

    history: HistoryPruning.Config | None = None
    attention: component_config("sparse_attention", optional=True) = None  # type: ignore[valid-type]
    schedule: PruneSchedule.Config | None = None
    routing: RoutingConfig | None = None
    drafts: DraftConfig | None = None


P = TypeVar("P", bound=nn.Module)


def placed(part: P, model: nn.Module) -> P:
    """A part that a model takes, on the model's device, in its precision and mode."""
    like = next(model.parameters(), None)
    return (part if like is None else part.to(device=like.device, dtype=like.dtype)).train(model.training)


def placed_schedule(config: RetrieverEfficiency | None, model: nn.Module, layers: int) -> PruneSchedule | None:
    """The schedule that a model is told to take, see `placed`; None for none.

    Raises:
        ConfigError: it drops tokens after another than one of the first ``layers`` layers.
    """
    if config is None or config.schedule is None:
        return None
    made = placed(PruneSchedule(config.schedule), model)
    made.require(layers)
    return made


def pruned_history(pruning: HistoryPruning, batch: SequenceBatch, vectors: Tensor) -> SequenceBatch:
    """The histories that a model reads, from those that a user has; ``vectors`` float ``[S, d]`` stand for the events."""
    view = TokenView.of(vectors, batch.offsets, ids=batch.items)
    kept = pruning(view)
    return SequenceBatch(kept.gather(batch.items), kept.offsets)
