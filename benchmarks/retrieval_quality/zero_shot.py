# SPDX-License-Identifier: Apache-2.0
"""RecGPT trained on two catalogues and asked about a third that it has never seen, beside text similarity and a few-shot SASRec.

Each cell (a target, a variant of the model, a seed) is a JSON line; a training that was interrupted goes on from its checkpoint::

    python -m benchmarks.retrieval_quality.zero_shot --targets beauty --variants full --seeds 0
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.retrieval_quality.data import CACHE, Dataset, load
from benchmarks.retrieval_quality.grid import read_ranks, write_ranks
from benchmarks.retrieval_quality.items import text_of, tokenizer_of
from benchmarks.retrieval_quality.plans import PLANS, training
from benchmarks.retrieval_quality.train import Training, forget, metrics
from pipelines.steps.pretraining import Pretraining, Source
from recsys.bundle.environment import code_commit
from recsys.core.config import validate
from recsys.core.files import sha256_json
from recsys.data.batch import SequenceBatch
from recsys.data.sequences import SequenceData, histories
from recsys.data.windows import SequenceLoader
from recsys.evaluation.retrieval import Scorer, event_ranks, slices
from recsys.evaluation.tuned_baselines import tuned_text_knn
from recsys.retrieval.base import CodeRetriever
from recsys.retrieval.baselines import Popularity, RepeatLast
from recsys.retrieval.catalogue import GatherIndex
from recsys.retrieval.code_table import CodeTable
from recsys.retrieval.codes import code_items
from recsys.retrieval.items import ItemTable
from recsys.retrieval.items import joined as joined_items
from recsys.retrieval.models import RecGPT
from recsys.retrieval.state import SlotLogProbs
from recsys.scaling.lines import Lines
from recsys.training.progress import NoProgress
from recsys.training.trainer import History
from recsys.training.trainer import Training as HowToTrain

RAW = Path(__file__).parents[2] / "docs" / "results" / "raw" / "zero_shot.jsonl"
VERSION = 1
DOMAINS = ("beauty", "video_games", "ml_1m")
RECENT = 100  # events of a user of MovieLens-1M, so that no domain is most of the training
ENCODER = "minilm"
TOKENIZER = {"name": "fsq", "slots": 4, "levels": [8, 5, 5, 5], "epochs": 100, "learning_rate": 1e-3}
AXES = {"name": "axes_fsq", "slots": 16, "levels": [5, 5, 5, 5]}  # four times as many numbers, of which four fifths of likeness is left
CHEAPER = {"recent": 50, "precision": "bf16"}  # for sixteen slots, whose steps take four times as long
MODEL: Mapping[str, Any] = {"name": "recgpt", "dim": 192, "blocks": 3, "heads": 6, "dropout": 0.1, "max_length": 50}
WINDOWS = {"stride": 50, "alike": True}
TRAINING = training(128, 6, 1e-3, 2)
VALIDATION = 2000  # steps of each domain of the training
# The bar of the paper: SASRec on a tenth of the target's users, stopped by validation events of all of them, more than a tenth knows.
FEW = 0.1
FEW_TRAINING = training(128, 100, 1e-3, 12)
# What the paper takes away, each from the whole model; `no_trie` is the whole model decoded without the catalogue. Ours: `axes` has other
# codes, which keep what texts say of likeness, and are read and predicted by their digits. In `axes_turned` the users of each source are
# divided among copies of it besides, whose texts' embeddings are turned in space, each copy's in its own way. So no code means the same
# everywhere, and what can be learnt is how an item's codes follow from those of the history. Validation and the target stand in one more
# turn.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "random_codes": {"codes": "random"},
    "causal": {"bidirectional": False},
    "no_auxiliary": {"auxiliary": False},
    "axes": {"codes": "axes", **CHEAPER},
    "axes_turned": {"codes": "axes", "turns": 8, **CHEAPER},
}
BASELINES = ("popularity", "repeat_last", "text_knn", "sasrec_few")
Found = tuple[dict[str, Any], dict[str, np.ndarray]]  # what a record says besides, and ranks by way of ranking
_FREE = 10  # combinations of codes that decoding without the catalogue lists; they are of the ten best codes of each slot


class ZeroShot:
    """The finished cells, and the runner of those that are missing.

    Args:
        raw: the file of JSON lines.
        cache: of checkpoints and encoded texts.
        domains: by name, among which the target is.
    """

    def __init__(self, domains: Mapping[str, Dataset], raw: Path = RAW, cache: Path = CACHE) -> None:
        self.domains, self.raw, self.cache = domains, raw, cache
        self._lines = Lines(raw, "cell")

    def records(self) -> list[dict[str, Any]]:
        """The finished cells."""
        return list(self._lines.read().values())

    def baselines(self, target: str) -> None:
        """What needs no training elsewhere; popularity and SASRec know events of the target, the others none."""
        data = self.domains[target]
        steps = data.split.test

        def by(scores: Callable[[SequenceBatch], np.ndarray]) -> dict[str, np.ndarray]:
            return _both_ways(lambda exclude: event_ranks(scores, data.data, steps, MODEL["max_length"], exclude_seen=exclude))

        def popularity() -> Found:
            return {}, by(Popularity(Popularity.Config()).fit(data.split.train, data.count).scores)

        def repeat_last() -> Found:
            return {}, by(RepeatLast(RepeatLast.Config()).fit(data.split.train, data.count).scores)

        def text_knn() -> Found:
            text = text_of(data, ENCODER)
            valid = data.split.valid.sample(VALIDATION, 0)

            def quality(scores: Scorer) -> float:
                return metrics(event_ranks(scores, data.data, valid, MODEL["max_length"]))["ndcg@10"]

            # By the target's own validation, which RecGPT is not given.
            model = tuned_text_knn(data.split.train, text, quality)
            return {"chosen": model.config.model_dump(mode="json")}, by(model.scores)

        sasrec = {"name": "sasrec", **PLANS["sasrec"].model, "dropout": 0.5}
        few = {"model": sasrec, "windows": WINDOWS, "training": FEW_TRAINING, "users": FEW}

        def sasrec_few() -> Found:
            some = replace(data, users=FEW)
            run = Training(some, few, 0, ItemTable(some.count, some.warm), None)
            folder = self.cache / "training" / sha256_json([target, few])[:16]
            outcome = run.fit(folder)
            forget(folder)
            return outcome, _both_ways(lambda exclude: run.ranks(steps, exclude_seen=exclude))

        text = {"encoder": ENCODER, "columns": data.columns, "validation": VALIDATION}
        for name, make, config in (
            ("popularity", popularity, {}),
            ("repeat_last", repeat_last, {}),
            ("text_knn", text_knn, text),
            ("sasrec_few", sasrec_few, few),
        ):
            self._cell(target, name, 0, {**config, "longest": MODEL["max_length"]}, make)

    def variant(self, target: str, variant: str, seed: int) -> None:
        """Train on the other domains, and rank the target's test events; the whole model is also decoded without the catalogue."""
        settings = dict(VARIANTS[variant])
        codes, turns, recent = settings.pop("codes", "fsq"), settings.pop("turns", 0), settings.pop("recent", RECENT)
        training = {**TRAINING, "trainer": {**TRAINING["trainer"], "precision": settings.pop("precision", "fp32")}}
        tokenizer = AXES if codes == "axes" else TOKENIZER
        settings |= {"code_digits": AXES["levels"]} if codes == "axes" else {}
        config = {"model": {**MODEL, **settings}, "codes": codes, "tokenizer": tokenizer, "windows": WINDOWS, "training": training}
        sources = [name for name in self.domains if name != target]
        columns = {name: data.columns for name, data in self.domains.items()}
        config |= {"sources": sources, "columns": columns, "encoder": ENCODER, "recent": recent, "validation": VALIDATION}
        config |= {"turns": turns} if turns else {}

        def run() -> Found:
            asked = Asked({name: self.domains[name] for name in config["sources"]}, config, seed, self.cache)
            history = asked.fit(self.cache / "training" / sha256_json([target, config, seed])[:16])
            curve = [dict(epoch.validation) for epoch in history.epochs]
            parameters = sum(parameter.numel() for parameter in asked.model.parameters())
            about = {"parameters": parameters, "curve": curve, "steps": history.steps}
            return about, asked.asked(self.domains[target], unconstrained=variant == "full")

        self._cell(target, variant, seed, config, run)

    def _cell(
        self,
        target: str,
        variant: str,
        seed: int,
        config: Mapping[str, Any],
        run: Callable[[], Found],
    ) -> None:
        fingerprints = {name: data.fingerprint for name, data in self.domains.items()}
        identity = {"version": VERSION, "target": target, "variant": variant, "seed": seed, "config": config, "data": fingerprints}
        key = sha256_json(identity)[:16]
        if key in self._lines.read():
            return
        started = perf_counter()
        outcome, ranks = run()
        folder = self.raw.with_suffix("")
        test = {}
        for way, own in ranks.items():
            write_ranks(folder / f"{key}_{way}.npz", own)
            test[way] = self.figures(target, own)
        record = {"cell": key, **identity, **outcome, "test": test, "seconds": round(perf_counter() - started, 1), "commit": code_commit()}
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._lines.append(record)
        shown = "  ".join(f"{way}: {values['all']['ndcg@10']:.4f} all, {values['new']['ndcg@10']:.4f} new" for way, values in test.items())
        print(f"{target} {variant} seed {seed}: NDCG@10 {shown}", flush=True)

    def figures(self, target: str, ranks: np.ndarray) -> dict[str, dict[str, float]]:
        """Metrics over all targets, and over those that are not in the user's history."""
        data = self.domains[target]
        parts = slices(data.data, data.split.train, data.split.test, data.count)
        return {name: metrics(ranks[parts[name]]) for name in ("all", "new")}

    def ranks(self, cell: str, way: str) -> np.ndarray:
        """What a cell's ranks were: ``unseen`` without the items of the history, ``any`` with them, ``no_trie``."""
        return read_ranks(self.raw.with_suffix("") / f"{cell}_{way}.npz")


class Asked:
    """RecGPT over several catalogues, as a cell has it.

    Args:
        sources: what it is trained on, by name.
        config: of the cell.
        seed: of everything that is random.
        cache: of encoded texts and tokenizers.
    """

    def __init__(self, sources: Mapping[str, Dataset], config: Mapping[str, Any], seed: int, cache: Path) -> None:
        self._config, self._seed, self._turns = config, seed, config.get("turns", 0)
        whole = [
            Source(name, data.data, _recent(data.split.train, config["recent"]), data.split.valid.sample(VALIDATION, 0), _told(data))
            for name, data in sources.items()
        ]
        own = [copy for source in whole for copy in _turned_copies(source, self._turns)]
        together = replace(
            next(iter(sources.values())),
            name="+".join(source.name for source in own),
            fingerprint="+".join(data.fingerprint for data in sources.values()),
            cache=cache,
        )
        self._tokenizer = tokenizer_of(together, joined_items([source.items for source in own]), ENCODER, config["tokenizer"])
        self._training = Pretraining(own, validate(RecGPT.Config, dict(config["model"])), GatherIndex.Config(), self._coded, seed)

    @property
    def model(self) -> CodeRetriever:
        """RecGPT."""
        return self._training.model

    def coded(self, target: Dataset) -> ItemTable:
        """A data set's items with codes by the tokenizer of the training."""
        return self._coded(_turned(_told(target), self._turns))

    def fit(self, folder: Path) -> History:
        """Train, or go on with what stands in the folder."""
        windows, training = validate(SequenceLoader.Config, self._config["windows"]), validate(HowToTrain, self._config["training"])
        context = {"cell": dict(self._config), "seed": self._seed}
        history = self._training.fit(windows, training, folder, context=context, progress=NoProgress())
        forget(folder)
        return history

    def asked(self, target: Dataset, *, unconstrained: bool) -> dict[str, np.ndarray]:
        """The ranks of the target's test events, with the items of the history left out and with them; and what free decoding finds."""
        items, steps = self.coded(target), target.split.test
        found = _both_ways(lambda exclude: self._training.ranks(target.data, items, steps, exclude_seen=exclude))
        if unconstrained:
            found["no_trie"] = _free(self.model, items, target)
        return found

    def _coded(self, items: ItemTable) -> ItemTable:
        if self._config["codes"] == "random":
            sizes = self._tokenizer.level_sizes
            random = torch.Generator().manual_seed(items.count)
            drawn = torch.stack([torch.randint(0, size, (items.count,), generator=random) for size in sizes], 1)
            return replace(items, codes=CodeTable(drawn, sizes, self._tokenizer.fingerprint))
        return replace(items, codes=code_items(self._tokenizer, items))


@torch.inference_mode()
def _free(model: CodeRetriever, items: ItemTable, target: Dataset) -> np.ndarray:
    """Ranks in lists of the ten best combinations of codes, of which those that are no item take their places in vain.

    A target has the place of its codes, whatever other items share them.
    """
    assert items.codes is not None
    model.replace_items(items)
    steps, sizes = target.split.test, items.codes.level_sizes
    ranks: list[np.ndarray] = []
    wanted = _numbers(items.codes.codes[torch.from_numpy(steps.targets.values)].unsqueeze(2), sizes)  # [S, 1], a target for each step
    for batch, _ in histories(target.data, steps, model.max_length, 256):
        state = model.encode(batch)
        assert isinstance(state, SlotLogProbs)
        best, codes = state.values.topk(_FREE, -1)
        scores = best[:, 0]
        for slot in range(1, len(sizes)):
            scores = (scores[:, :, None] + best[:, slot, None]).flatten(1)
        listed = _numbers(codes, sizes).gather(1, scores.topk(_FREE).indices)
        done = sum(len(own) for own in ranks)
        hit = (listed == wanted[done : done + len(batch)]).numpy()
        ranks.append(np.where(hit.any(1), hit.argmax(1) + 1.0, np.inf))
    return np.concatenate(ranks)


def _told(data: Dataset) -> ItemTable:
    return ItemTable(data.count, data.warm, text_of(data, ENCODER))


def _turned_copies(source: Source, turns: int) -> list[Source]:
    """The catalogue as it is, or ``turns`` copies, each with a share of the users, and one more for validation alone."""
    if not turns:
        return [source]
    owner = source.train.owner % turns
    copies = [
        Source(f"{source.name}@{turn}", source.data, source.train.where(owner == turn), None, _turned(source.items, turn))
        for turn in range(turns)
    ]
    return [*copies, replace(source, train=source.train.where(owner < 0), items=_turned(source.items, turns))]


def _turned(items: ItemTable, turn: int) -> ItemTable:
    """The same texts, turned in space by a matrix of this number; 0 of no turns is none."""
    assert items.text is not None
    if not turn:
        return items
    random = torch.Generator().manual_seed(turn)
    turned, _ = torch.linalg.qr(torch.randn(items.text.shape[1], items.text.shape[1], generator=random))
    return replace(items, text=items.text @ turned)


def _numbers(codes_bkc: Tensor, sizes: Sequence[int]) -> Tensor:
    """int64 ``[B, c ** K]``: a number for every combination of one of c codes of each of K slots, the last slot running fastest."""
    number = codes_bkc[:, 0]
    for slot, size in enumerate(sizes[1:], 1):
        number = (number[:, :, None] * size + codes_bkc[:, slot, None]).flatten(1)
    return number


def _both_ways(ranks: Callable[[bool], np.ndarray]) -> dict[str, np.ndarray]:
    return {"unseen": ranks(True), "any": ranks(False)}


def _recent(data: SequenceData, most: int) -> SequenceData:
    """The last events of every user."""
    return data.where(np.arange(len(data.items)) >= data.offsets[1:][data.owner] - most)


def main(argv: Sequence[str]) -> int:
    """Fill the cells that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval_quality.zero_shot", description=__doc__)
    parser.add_argument("--targets", default=",".join(DOMAINS), help="comma-separated")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; empty for the baselines alone")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0], help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--raw", type=Path, default=RAW, help="the file of finished cells")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    runner = ZeroShot({name: load(name) for name in DOMAINS}, arguments.raw)
    for target in arguments.targets.split(","):
        runner.baselines(target)
        for variant, seed in product(filter(None, arguments.variants.split(",")), arguments.seeds):
            runner.variant(target, variant, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
