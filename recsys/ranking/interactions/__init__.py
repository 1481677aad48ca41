# SPDX-License-Identifier: Apache-2.0
"""Interactions of the flat vector of fields, and the hidden layers that surround them."""

from recsys.ranking.interactions.bilinear import BilinearFusion
from recsys.ranking.interactions.cross import Cross, CrossNet
from recsys.ranking.interactions.dot import DotInteraction
from recsys.ranking.interactions.hidden import HiddenLayers, Widths
from recsys.ranking.interactions.mask import FieldNorm, MaskBlock

__all__ = ["BilinearFusion", "Cross", "CrossNet", "DotInteraction", "FieldNorm", "HiddenLayers", "MaskBlock", "Widths"]
