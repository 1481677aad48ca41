# SPDX-License-Identifier: Apache-2.0
"""Vectors of fields by name, as rankers have them before tokens."""

import torch


def flat(fields: dict[str, torch.Tensor]) -> torch.Tensor:
    """One after another: ``[B, W]``."""
    return torch.cat(list(fields.values()), 1)
