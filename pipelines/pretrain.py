# SPDX-License-Identifier: Apache-2.0
"""Pre-training: a recipe that names catalogues, an item tokenizer and a model over codes, and what is kept of it for other catalogues."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from rich.console import Console

from pipelines.recipe import Split
from pipelines.report.plots import curves
from pipelines.steps.pretraining import Pretraining, Source
from pipelines.steps.tokenizer import coded, fit_tokenizer
from recsys.bundle.environment import code_commit
from recsys.core import components
from recsys.core.components import component_config
from recsys.core.config import Config
from recsys.core.errors import ConfigError
from recsys.core.files import sha256_json, write_bytes
from recsys.core.schema import EVENT_TIME, ITEM
from recsys.data.datasets import Dataset, load_dataset
from recsys.data.sequences import SequenceData, evaluation_steps
from recsys.data.splits import global_time_split, order_events
from recsys.data.windows import SequenceLoader
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.catalogue import Catalogue, check_pair
from recsys.retrieval.codes import ItemCodes
from recsys.retrieval.items import ItemTable, joined
from recsys.retrieval.pretrained import save_pretrained
from recsys.text import TextEncoder, item_vectors
from recsys.training.trainer import History, Training


class DomainRecipe(Config):
    """One catalogue.

    Attributes:
        dataset: where events and items come from.
        columns: the item columns that make the text, in this order; none for an encoder that knows items by their ids.
    """

    dataset: component_config("dataset")  # type: ignore[valid-type]
    columns: tuple[str, ...] = ()


class PretrainRecipe(Config):
    """A pre-training.

    Attributes:
        name: what is kept stands below a folder of this name.
        seed: of every random choice.
        plugins: packages that register a user's own components.
        domains: the catalogues, by name.
        split: of each by global time; its test period is left alone.
        encoder: of the items' text.
        codes: the tokenizer, fitted on the items of all training periods.
        model: a retriever that speaks in codes.
        index: by which validation asks it.
        windows: of the histories.
        training: of the model.
        validation_steps: how many steps of each catalogue, drawn by seed, validation predicts.
    """

    name: str
    seed: int = 0
    plugins: tuple[str, ...] = ()
    domains: Mapping[str, DomainRecipe] = Field(min_length=1)
    split: Split = Split()
    encoder: component_config("text_encoder")  # type: ignore[valid-type]
    codes: ItemCodes
    model: component_config("retriever")  # type: ignore[valid-type]
    index: component_config("index")  # type: ignore[valid-type]
    windows: SequenceLoader.Config = SequenceLoader.Config()
    training: Training
    validation_steps: int = Field(2000, ge=1)


@dataclass(frozen=True)
class Pretrained:
    """What is left of a pre-training.

    Attributes:
        directory: what `recsys.retrieval.pretrained.from_pretrained` reads.
        history: of the training; None where the directory was there already.
    """

    directory: Path
    history: History | None


def execute(recipe: PretrainRecipe, home: Path, console: Console) -> Pretrained:
    """Train and keep the model; an interrupted training goes on, and one that was finished is not done again.

    Args:
        recipe: what to train on what.
        home: results stand in ``pretrained/<name>/<a hash of recipe and data>`` below it.
        console: where progress is shown.

    Raises:
        ConfigError: the model does not speak in codes, or the index is not one for it.
    """
    cls = components.get("retriever", recipe.model.name)
    if not issubclass(cls, CodeRetriever):
        raise ConfigError(f"model: expected a retriever that speaks in codes, got {recipe.model.name!r}")
    check_pair(cls, components.get("index", recipe.index.name))
    datasets = {name: load_dataset(domain.dataset) for name, domain in recipe.domains.items()}
    context = {"recipe": recipe.model_dump(mode="json"), "data": {name: dataset.fingerprint() for name, dataset in datasets.items()}}
    directory = home / "pretrained" / recipe.name / sha256_json(context)[:12]
    folder = home / "pretrained" / "training" / directory.name / recipe.name
    if directory.is_dir():
        shutil.rmtree(folder.parent, ignore_errors=True)  # of a process that was stopped at the very end
        return Pretrained(directory, None)
    encoder = components.build("text_encoder", recipe.encoder)
    sources = [_source(name, recipe, dataset, encoder, home / "cache") for name, dataset in datasets.items()]
    for source in sources:
        console.print(
            f"[dim]{source.name}: {source.items.count:,} items, {len(source.train.items):,} events to train on[/]", highlight=False
        )
    tokenizer = fit_tokenizer(recipe.codes, joined([source.items for source in sources]), recipe.seed)
    own = Pretraining(sources, recipe.model, recipe.index, lambda items: coded(recipe.codes, tokenizer, items), recipe.seed)
    history = own.fit(recipe.windows, recipe.training, folder, context=context)
    notes = {"domains": list(recipe.domains), "commit": code_commit(), "history": history.rows(), "recipe": context["recipe"]}
    write_bytes(directory.with_suffix(".svg"), _picture(history, list(recipe.domains)).encode())
    save_pretrained(own.model, tokenizer, encoder.identity, directory, notes)
    shutil.rmtree(folder.parent)
    return Pretrained(directory, history)


def _source(name: str, recipe: PretrainRecipe, dataset: Dataset, encoder: TextEncoder, cache: Path) -> Source:
    """A catalogue whose training period ends where validation begins."""
    split = global_time_split(dataset.interactions.column(EVENT_TIME), recipe.split.valid, recipe.split.test)
    rows = Catalogue(dataset.items.column(ITEM)).rows
    data = SequenceData.from_events(order_events(dataset.interactions, recipe.seed), rows)
    train = data.before(split.valid_start)
    warm = torch.from_numpy(train.occurring(dataset.items.num_rows))
    text = torch.from_numpy(item_vectors(encoder, dataset.items, recipe.domains[name].columns, cache))
    valid = evaluation_steps(data, split.valid_start, split.test_start).sample(recipe.validation_steps, recipe.seed)
    return Source(name, data, train, valid, ItemTable(len(warm), warm, text))


def _picture(history: History, domains: list[str]) -> str:
    """Validation by epoch, of every catalogue."""
    rows: list[dict[str, Any]] = history.rows()
    lines = {name: [(row["epoch"], row[f"ndcg@10.{name}"]) for row in rows if f"ndcg@10.{name}" in row] for name in domains}
    return curves([("validation NDCG@10", lines)])
