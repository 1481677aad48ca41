# SPDX-License-Identifier: Apache-2.0
"""The loop in which a peer trains: the same rows, epochs, batch size and early stopping as ours. Needs numpy and torch alone."""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ranking_contest.data import quality

_CHUNK = 4096
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A peer's model, as its own trainer would drive it.

    Attributes:
        model: the module.
        step: one training step on inputs and labels ``[B]``.
        probability: ``[B]`` of inputs, called in evaluation mode without gradients.
    """

    model: torch.nn.Module
    step: Callable[[Inputs, torch.Tensor], None]
    probability: Callable[[Inputs], torch.Tensor]


def main(build: Callable[[dict[str, Any]], Peer]) -> None:
    """Read ``request.json`` and ``data.npz`` in the folder that is the first argument; write ``answer.json`` and ``test.npy`` there."""
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    with np.load(folder / "data.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    peer = build(request)
    started = time.perf_counter()
    valid = train(peer, request, arrays)
    answer = {"valid": valid, "seconds": time.perf_counter() - started, **sizes(peer.model)}
    np.save(folder / "test.npy", predict(peer, request, arrays, "test"))
    (folder / "answer.json").write_text(json.dumps(answer))


def train(peer: Peer, request: dict[str, Any], arrays: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    """AUC and log-loss on validation after each epoch; the model ends with the weights of the best."""
    labels, valid = arrays["train.label"], list[dict[str, float]]()
    best = -1
    weights = copy.deepcopy(peer.model.state_dict())
    for epoch in range(request["epochs"]):
        peer.model.train()
        order = torch.from_numpy(np.random.default_rng([request["seed"], epoch]).permutation(len(labels)))
        for rows in order.split(request["batch_size"]):
            peer.step(_inputs(request, arrays, "train", rows), labels[rows])
        valid.append(quality(arrays["valid.label"].numpy(), predict(peer, request, arrays, "valid")))
        if best < 0 or valid[-1]["auc"] > valid[best]["auc"]:
            best, weights = epoch, copy.deepcopy(peer.model.state_dict())
        elif epoch - best >= request["patience"]:
            break
    peer.model.load_state_dict(weights)
    return valid


@torch.no_grad()
def predict(peer: Peer, request: dict[str, Any], arrays: dict[str, torch.Tensor], part: str) -> np.ndarray:
    """float32 probabilities of a part's rows."""
    peer.model.eval()
    rows = torch.arange(len(arrays[f"{part}.label"])).split(_CHUNK)
    parts = [peer.probability(_inputs(request, arrays, part, chunk)).reshape(-1) for chunk in rows]
    return np.asarray(torch.cat(parts).numpy(), dtype=np.float32)


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of the tables, and of all else."""
    tables = {id(p): p.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    dense = {id(p): p.numel() for p in model.parameters() if id(p) not in tables}
    return {"table_parameters": sum(tables.values()), "dense_parameters": sum(dense.values())}


def _inputs(request: dict[str, Any], arrays: dict[str, torch.Tensor], part: str, rows: torch.Tensor) -> Inputs:
    return {field["name"]: arrays[f"{part}.{field['name']}"][rows] for field in request["fields"]}
