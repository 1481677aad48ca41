# SPDX-License-Identifier: Apache-2.0
"""The codes of a catalogue's items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recsys.core.config import Config as BaseConfig
from recsys.core.errors import BundleError, DataError

Repair = Literal["keep", "suffix", "nearest_free"]
"""What becomes of items that share their codes.

- ``keep``: nothing. They have equal scores, and stand in a list in the order of their rows (in RecGPT's published code, only the last of
  them can be recommended).
- ``suffix``: one more level, which numbers the items of a group, 0 for the first one (TIGER, arXiv 2305.05065, §3.1).
- ``nearest_free``: all but the first get other codes of the last level, the nearest that nobody has.
"""


class _About(BaseConfig):
    """What a file of codes says of them."""

    level_sizes: tuple[Annotated[int, Field(ge=1)], ...]
    tokenizer: str
    repair: Repair


@dataclass(frozen=True)
class CodeTable:
    """The codes of all rows of a catalogue. A row's codes never change once it has them: new items are appended.

    Attributes:
        codes: int64 ``[N, L]``.
        level_sizes: how many codes each level has.
        tokenizer: the fingerprint of the tokenizer that made them.
        repair: what was done with items that share their codes.
    """

    codes: Tensor
    level_sizes: tuple[int, ...]
    tokenizer: str
    repair: Repair = "keep"

    def __post_init__(self) -> None:
        """Hold that every code is one of its level."""
        check_codes(self.codes, self.level_sizes)

    def __len__(self) -> int:
        """N."""
        return len(self.codes)

    @property
    def levels(self) -> int:
        """L."""
        return len(self.level_sizes)

    def save(self, file: Path) -> None:
        """Write a safetensors file."""
        about = _About(level_sizes=self.level_sizes, tokenizer=self.tokenizer, repair=self.repair)
        save_file({"codes": self.codes.contiguous()}, file, metadata={"codes": about.model_dump_json()})

    @classmethod
    def load(cls, file: Path) -> "CodeTable":
        """Read what `save` wrote.

        Raises:
            BundleError: the file is absent, is not a table of codes, or holds a code that is not one of its level.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                about = _About.model_validate_json(stored.metadata()["codes"], strict=True)
                codes = stored.get_tensor("codes")
            return cls(codes, about.level_sizes, about.tokenizer, about.repair)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, DataError) as error:
            raise BundleError(f"{file}: cannot read the codes: {error}") from None


def check_codes(codes_nl: Tensor, level_sizes: Sequence[int]) -> None:
    """Hold that codes are int64 ``[N, L]``, each one of its level.

    Raises:
        DataError: names the level and the code.
    """
    if codes_nl.ndim != 2 or codes_nl.shape[1] != len(level_sizes) or codes_nl.dtype != torch.int64:
        raise DataError(f"codes: expected int64 [N, {len(level_sizes)}], got {codes_nl.dtype} {list(codes_nl.shape)}")
    for level, size in enumerate(level_sizes if len(codes_nl) else ()):
        low, high = (int(bound) for bound in codes_nl[:, level].aminmax())
        if low < 0 or high >= size:
            raise DataError(f"codes: level {level} has the codes 0 to {size - 1}, got {low if low < 0 else high}")
