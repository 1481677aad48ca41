# SPDX-License-Identifier: Apache-2.0
"""From a folder, a hub's name or a plain architecture to a model of transformers, whose vocabulary is the prompt's and no more."""

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn

from recsys.core.errors import ComponentError, ConfigError
from recsys.retrieval.backbones.base import LanguageModelConfig

C = TypeVar("C", bound=LanguageModelConfig)

_OF_THE_FILE = ("_name_or_path", "transformers_version", "architectures", "dtype")


def resolve(config: C, model_type: str) -> tuple[C, Any]:
    """The configuration with the architecture and the prompt's tokens in it, and the model.

    A configuration that already has an architecture is taken as it is, and ``pretrained`` is not looked at: the model's weights are
    drawn, for a state dict to replace.

    Args:
        config: of a backbone.
        model_type: of the architecture, as transformers names it.

    Returns:
        The resolved configuration, and the model, of whose input embeddings only the rows of `vocabulary` are left.

    Raises:
        ComponentError: transformers is not installed, or cannot load the model or its tokenizer.
        ConfigError: the model is of another type; its file lacks weights; there is a prompt, but neither tokens nor a tokenizer.
    """
    if not find_spec("transformers"):
        raise ComponentError(f"set_backbone {model_type!r}: needs transformers: install the extra [text]")
    if config.architecture is not None:
        _require_type(config.architecture.get("model_type"), model_type, "architecture")
        resolved = config.model_copy(update=_tokens(config, None))
        return resolved, _drawn(resolved)
    architecture = _read_architecture(config, model_type)
    resolved = config.model_copy(update={"architecture": architecture, **_tokens(config, _read_tokenizer)})
    model = _read_weights(config)
    _keep_rows(model, vocabulary(resolved), config)
    return resolved, model


def vocabulary(resolved: LanguageModelConfig) -> list[int]:
    """The distinct tokens of the prompt, ascending."""
    return sorted({*(resolved.instruction_tokens or ()), *(resolved.response_tokens or ())})


def places(tokens: Sequence[int], words: list[int]) -> torch.Tensor:
    """int64 ``[len(tokens)]``: the row of each token in the embeddings that are left."""
    return torch.tensor([words.index(token) for token in tokens], dtype=torch.int64)


def _tokens(config: LanguageModelConfig, read_tokenizer: Callable[[LanguageModelConfig], Any] | None) -> dict[str, tuple[int, ...]]:
    return {f"{part}_tokens": _tokens_of(config, part, read_tokenizer) for part in ("instruction", "response")}


def _tokens_of(config: LanguageModelConfig, part: str, read_tokenizer: Callable[[LanguageModelConfig], Any] | None) -> tuple[int, ...]:
    """Those that are given, else those of the text, without special tokens."""
    text, given = getattr(config, part), getattr(config, f"{part}_tokens")
    if given is not None:
        return tuple(given)
    if not text:
        return ()
    if read_tokenizer is None:
        raise ConfigError(f"backbone.{part}: expected an empty text or {part}_tokens, since an architecture has no tokenizer; got {text!r}")
    tokenizer = read_tokenizer(config)
    tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not tokens or tokenizer.unk_token_id in tokens:  # where there are no files of a tokenizer, transformers makes an empty one
        raise ConfigError(
            f"backbone.{part}: the tokenizer of {config.pretrained!r} has no tokens for {text!r}; expected another text, or {part}_tokens"
        )
    return tokens


def _drawn(config: LanguageModelConfig) -> Any:
    """A model with weights drawn by its own rule."""
    from transformers import AutoConfig, AutoModel

    assert config.architecture is not None
    words = len(vocabulary(config))
    try:
        architecture = AutoConfig.for_model(**{**config.architecture, "vocab_size": max(words, 1), "pad_token_id": None})
        model: Any = AutoModel.from_config(architecture, dtype=_dtype(config), attn_implementation="sdpa")
    except Exception as error:  # its configurations raise whatever they meet
        raise ConfigError(f"backbone.architecture: cannot be built: {error}") from error
    _keep_rows(model, list(range(words)), config)
    return model


def _keep_rows(model: Any, rows: list[int], config: LanguageModelConfig) -> None:
    """Reduce the input embeddings to these rows, ascending."""
    weight = model.get_input_embeddings().weight.detach()
    if rows and rows[-1] >= len(weight):
        raise ConfigError(f"backbone.pretrained: {config.pretrained!r} has {len(weight)} tokens; the prompt has token {rows[-1]}")
    model.set_input_embeddings(nn.Embedding.from_pretrained(weight[rows].clone(), freeze=False))


def _read_architecture(config: LanguageModelConfig, model_type: str) -> dict[str, Any]:
    from transformers import AutoConfig

    found: Any = _load(config, "model", AutoConfig)
    _require_type(found.model_type, model_type, f"pretrained: {config.pretrained!r}")
    architecture: dict[str, Any] = json.loads(found.to_json_string(use_diff=False))
    return {key: value for key, value in architecture.items() if key not in _OF_THE_FILE}


def _read_tokenizer(config: LanguageModelConfig) -> Any:
    from transformers import AutoTokenizer

    return _load(config, "tokenizer, which the prompt needs", AutoTokenizer)


def _read_weights(config: LanguageModelConfig) -> Any:
    from transformers import AutoModel

    options = {"dtype": _dtype(config), "attn_implementation": "sdpa", "use_safetensors": True, "output_loading_info": True}
    model, info = _load(config, "weights", AutoModel, **options)
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"backbone.pretrained: {config.pretrained!r} lacks {len(missing)} weights, such as {missing[0]}")
    return model


def _load(config: LanguageModelConfig, what: str, loader: Any, **options: Any) -> Any:
    """What ``loader`` reads from the folder or the hub's name; remote code is never run."""
    try:
        return loader.from_pretrained(
            config.pretrained, revision=config.revision, local_files_only=config.local_files_only, trust_remote_code=False, **options
        )
    except Exception as error:  # its loaders raise whatever they meet
        raise ComponentError(f"backbone.pretrained: cannot load the {what} of {config.pretrained!r}: {error}") from error


def _require_type(found: Any, expected: str, where: str) -> None:
    if found != expected:
        raise ConfigError(f"backbone.{where}: expected a model of type {expected!r}, got {found!r}")


def _dtype(config: LanguageModelConfig) -> torch.dtype:
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
