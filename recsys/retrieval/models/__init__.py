# SPDX-License-Identifier: Apache-2.0
"""The retrievers that ship with the framework. Importing this package registers them."""

from recsys.retrieval.models.hstu import HSTU
from recsys.retrieval.models.recgpt import RecGPT
from recsys.retrieval.models.rpg import RPG
from recsys.retrieval.models.sasrec import SASRec
from recsys.retrieval.models.setrec import SETRec
from recsys.retrieval.models.tiger import TIGER

__all__ = ["HSTU", "RPG", "TIGER", "RecGPT", "SASRec", "SETRec"]
