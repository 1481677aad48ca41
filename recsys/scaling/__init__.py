# SPDX-License-Identifier: Apache-2.0
"""Scaling laws: impressions with a known optimum, histories, sweeps over sizes, fits of power laws, and their pictures."""

from recsys.scaling.data import PlantedData, ScalingData
from recsys.scaling.encoded import EncodedData, ImpressionsData, write_encoded
from recsys.scaling.histories import HistoriesData
from recsys.scaling.retrieval_data import RetrievalData

__all__ = ["EncodedData", "HistoriesData", "ImpressionsData", "PlantedData", "RetrievalData", "ScalingData", "write_encoded"]
