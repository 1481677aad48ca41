# SPDX-License-Identifier: Apache-2.0
"""Tokens from groups of fields that belong together."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.core.components import register
from recsys.core.config import Config as BaseConfig
from recsys.core.config import Problem
from recsys.core.errors import ConfigError
from recsys.data.spec import check_groups
from recsys.ranking.mlp import mlp
from recsys.ranking.part import linear_flops
from recsys.ranking.tokenizers.base import Fields, Tokenizer

Groups = Mapping[str, tuple[str, ...]]


@register("tokenizer", "groups")
class GroupTokenizer(Tokenizer):
    """The semantic-group tokenizer of TokenMixer-Large (arXiv 2602.06563, eqs. 1-4).

    Token 0 is the global token ``MLP_g(concat(G_1, …, G_n))``, which reads the raw field vectors of all groups; token i is
    ``MLP_i(concat(G_i))``. T = groups + 1, or as many as groups without the global token (an ablation of the paper's table 5).

    Chosen where the paper is silent: each MLP is one affine map, or with ``hidden`` one hidden layer with SiLU.

    Raises:
        ConfigError: a field is unknown, in no group or in two; a group is empty; neither the tokenizer nor the inputs name any.
    """

    class Config(BaseConfig):
        """Which fields make which token.

        Attributes:
            groups: the fields of each token, by the token's name, in the order of the tokens; null for the groups of the inputs.
            hidden: the width of the MLPs' hidden layer; null for affine maps.
            global_token: whether there is one.
        """

        name: Literal["groups"] = "groups"
        groups: dict[str, tuple[str, ...]] | None = None
        hidden: int | None = Field(None, ge=1)
        global_token: bool = True

    def __init__(self, config: Config, fields: Fields, dim: int) -> None:
        super().__init__(fields, dim)
        widths = fields.widths
        self.groups = tuple(_chosen(config, fields).values())
        self.global_token = config.global_token
        group_widths = [sum(widths[field] for field in group) for group in self.groups]
        between = () if config.hidden is None else (config.hidden,)
        inputs = (sum(group_widths), *group_widths) if config.global_token else tuple(group_widths)
        self.projections = nn.ModuleList(mlp((width, *between, dim)) for width in inputs)
        self.tokens = len(self.projections)
        self._run_widths, self._runs_of = _runs(self.groups, widths)
        self._in_order = [i for own in self._runs_of for i in own] == list(range(len(self._run_widths)))

    @property
    def flops(self) -> int:
        """Those of the linear layers."""
        return linear_flops(self)

    def forward(self, x_bw: Tensor) -> Tensor:
        """See `Tokenizer.forward`."""
        runs = x_bw.split(self._run_widths, dim=1)
        groups = [runs[own[0]] if len(own) == 1 else torch.cat([runs[i] for i in own], dim=1) for own in self._runs_of]
        everything = [x_bw if self._in_order else torch.cat(groups, dim=1)] if self.global_token else []
        inputs = everything + groups
        return torch.stack([projection(x) for projection, x in zip(self.projections, inputs, strict=True)]).transpose(0, 1)


def _chosen(config: GroupTokenizer.Config, fields: Fields) -> Groups:
    """The tokenizer's own groups, or those of the inputs."""
    groups = fields.groups if config.groups is None else config.groups
    if config.groups is None and not groups:
        raise ConfigError("groups: the inputs have none; name them in encoder.groups, for every model, or in the tokenizer")
    try:
        check_groups(groups, fields.widths)
    except Problem as problem:
        raise ConfigError(f"groups: {problem.message}") from None
    return groups


def _runs(groups: Sequence[Sequence[str]], widths: Mapping[str, int]) -> tuple[list[int], list[list[int]]]:
    """The fewest pieces of all fields, one after another, of which every group is a concatenation.

    Returns:
        The width of each piece, and for each group its pieces.
    """
    place = {field: (group, i) for group, fields in enumerate(groups) for i, field in enumerate(fields)}
    run_widths: list[int] = []
    run_of: dict[str, int] = {}
    before: tuple[int, int] | None = None
    for field, width in widths.items():
        group, i = place[field]
        if before == (group, i - 1):
            run_widths[-1] += width
        else:
            run_widths.append(width)
        run_of[field], before = len(run_widths) - 1, (group, i)
    return run_widths, [list(dict.fromkeys(run_of[field] for field in fields)) for fields in groups]
