# SPDX-License-Identifier: Apache-2.0
"""Item tokenizers: from items to codes."""

from recsys.retrieval.tokenizers.atomic import Atomic
from recsys.retrieval.tokenizers.axes_fsq import AxesFSQ
from recsys.retrieval.tokenizers.base import CodeTokenizer, Progress, load_tokenizer
from recsys.retrieval.tokenizers.fsq import FSQ
from recsys.retrieval.tokenizers.health import Health, LevelHealth, health
from recsys.retrieval.tokenizers.opq import OPQ
from recsys.retrieval.tokenizers.residual_kmeans import ResidualKMeans
from recsys.retrieval.tokenizers.rq_vae import RQVAE
from recsys.retrieval.tokenizers.sliced_fsq import SlicedFSQ

__all__ = [
    "FSQ",
    "OPQ",
    "RQVAE",
    "Atomic",
    "AxesFSQ",
    "CodeTokenizer",
    "Health",
    "LevelHealth",
    "Progress",
    "ResidualKMeans",
    "SlicedFSQ",
    "health",
    "load_tokenizer",
]
