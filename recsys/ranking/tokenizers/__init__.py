# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: from the vectors of input fields to tokens ``[B, T, D]``; each in one file under its name."""

from recsys.ranking.tokenizers.auto_split import AutoSplitTokenizer
from recsys.ranking.tokenizers.base import Fields, Tokenizer
from recsys.ranking.tokenizers.fields import FieldTokenizer
from recsys.ranking.tokenizers.groups import GroupTokenizer
from recsys.ranking.tokenizers.permuted import PermutedTokenizer

__all__ = ["AutoSplitTokenizer", "FieldTokenizer", "Fields", "GroupTokenizer", "PermutedTokenizer", "Tokenizer"]
