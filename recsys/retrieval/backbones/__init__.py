# SPDX-License-Identifier: Apache-2.0
"""The pretrained language models of SETRec. Importing this package registers them; transformers is imported when one is built."""

from recsys.retrieval.backbones.base import LanguageModelConfig, SetBackbone
from recsys.retrieval.backbones.lora import LoRAConfig
from recsys.retrieval.backbones.qwen2 import Qwen2Backbone
from recsys.retrieval.backbones.t5 import T5Backbone

__all__ = ["LanguageModelConfig", "LoRAConfig", "Qwen2Backbone", "SetBackbone", "T5Backbone"]
