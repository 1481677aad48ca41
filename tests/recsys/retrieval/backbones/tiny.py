# SPDX-License-Identifier: Apache-2.0
"""Tiny language models with drawn weights, in a folder as a hub would have them, and the backbones over them."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, T5Config, T5ForConditionalGeneration

from recsys.core.components import get
from recsys.core.config import parse

KINDS = ("t5", "qwen2")
DIM = 16
WORDS = {letter: i for i, letter in enumerate("0123456789abcdefghij")}  # of one letter each
PROMPT = {"instruction": "375", "response": "79"}
TOKENS = {"instruction_tokens": (3, 7, 5), "response_tokens": (7, 9)}
NO_PROMPT = {"instruction": "", "response": ""}
MAX_LENGTH = 6


def config_of(kind):
    if kind == "t5":
        return T5Config(
            vocab_size=len(WORDS), d_model=DIM, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
            relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0, pad_token_id=0,
        )  # fmt: skip
    return Qwen2Config(
        vocab_size=len(WORDS), hidden_size=DIM, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip


def model_of(kind):
    """A model whose every part matters: no weight is near zero, no norm is 1, no softmax is all but hard."""
    torch.manual_seed(0)
    model = (T5ForConditionalGeneration if kind == "t5" else Qwen2ForCausalLM)(config_of(kind))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2 if kind == "t5" else 0.4)
        else:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.eval()


def tokenizer_of(kind):
    if kind == "qwen2":
        return Qwen2Tokenizer({**WORDS, "<|endoftext|>": len(WORDS)}, [])
    letters = Tokenizer(WordLevel({**WORDS, "?": len(WORDS)}, unk_token="?"))
    letters.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", eos_token="1")


def save(kind, folder, with_tokenizer=True):
    model = model_of(kind)
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer_of(kind).save_pretrained(folder)
    return model


def build(kind, folder, max_length=MAX_LENGTH, **config):
    cls = get("set_backbone", kind)
    return cls(parse(cls.Config, {"name": kind, "pretrained": str(folder), **PROMPT, **config}, source="test"), max_length).eval()


def histories(rows=3, length=5, tokens=3, seed=1):
    """Items ``[rows, length, tokens, d]`` and queries ``[tokens, d]``."""
    g = torch.Generator().manual_seed(seed)
    items = torch.randn(rows, length, tokens, DIM, generator=g)
    queries = torch.randn(tokens, DIM, generator=g)
    return items, queries
