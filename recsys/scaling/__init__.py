# SPDX-License-Identifier: Apache-2.0
"""Scaling laws: impressions with a known optimum, sweeps over sizes, fits of power laws, and their pictures."""

from recsys.scaling.data import PlantedData, ScalingData
from recsys.scaling.encoded import EncodedData, ImpressionsData, write_encoded

__all__ = ["EncodedData", "ImpressionsData", "PlantedData", "ScalingData", "write_encoded"]
