# SPDX-License-Identifier: Apache-2.0
"""The published rankers, each in one file under its name."""

from recsys.ranking.models.tokenmixer_large import TokenMixerLarge

__all__ = ["TokenMixerLarge"]
