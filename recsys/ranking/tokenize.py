# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: from the vectors of input fields to tokens ``[B, T, D]``."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recsys.core.errors import ConfigError, unknown
from recsys.ranking.mlp import mlp

Groups = Mapping[str, tuple[str, ...]]


class GroupTokenizer(nn.Module):
    """The semantic-group tokenizer of TokenMixer-Large (arXiv 2602.06563, eqs. 1-4).

    Token 0 is the global token ``MLP_g(concat(G_1, …, G_n))``, which reads the raw field vectors of all groups; token i is
    ``MLP_i(concat(G_i))``. T = groups + 1.

    Chosen where the paper is silent: each MLP is one affine map, or with ``hidden`` one hidden layer with SiLU.

    Args:
        groups: the fields of each token, by the token's name, in the order of the tokens.
        widths: the width of each field's vector.
        dim: D.
        hidden: the width of the MLPs' hidden layer, or None for affine maps.

    Raises:
        ConfigError: a field is unknown, in no group or in two; a group is empty.
    """

    def __init__(self, groups: Groups, widths: Mapping[str, int], dim: int, hidden: int | None = None) -> None:
        super().__init__()
        check_groups(groups, widths)
        self.groups = tuple(groups.values())
        group_widths = [sum(widths[field] for field in fields) for fields in self.groups]
        between = () if hidden is None else (hidden,)
        self.projections = nn.ModuleList(mlp((width, *between, dim)) for width in (sum(group_widths), *group_widths))

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.projections)

    def forward(self, fields: Mapping[str, Tensor]) -> Tensor:
        """The tokens.

        Args:
            fields: ``[B, width]`` for each field.

        Returns:
            ``[B, T, D]``, tokens-outermost in memory.
        """
        groups = [torch.cat([fields[field] for field in group], dim=1) for group in self.groups]
        inputs = (torch.cat(groups, dim=1), *groups)
        return torch.stack([projection(x) for projection, x in zip(self.projections, inputs, strict=True)]).transpose(0, 1)


def check_groups(groups: Groups, known: Mapping[str, int]) -> None:
    """Hold that the groups are a partition of the known fields.

    Raises:
        ConfigError: names the group and the field that break it.
    """
    group_of: dict[str, str] = {}
    for group, fields in groups.items():
        if not fields:
            raise ConfigError(f"groups: {group!r} holds no field")
        for field in fields:
            if field not in known:
                raise ConfigError(f"groups: {group!r}: {unknown('field', field, known)}")
            if field in group_of:
                raise ConfigError(f"groups: field {field!r} is in {group_of[field]!r} and again in {group!r}; expected exactly one group")
            group_of[field] = group
    if forgotten := [field for field in known if field not in group_of]:
        raise ConfigError(f"groups: field {forgotten[0]!r} is in no group; expected every field in exactly one ({', '.join(forgotten)})")
