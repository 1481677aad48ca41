# SPDX-License-Identifier: Apache-2.0
"""Tensors that several processes hold in parts, through `torch.distributed.checkpoint`, as safetensors and JSON.

::

    shards.json                        name → dtype, shape, and its parts: where each begins, how large it is, in which file
    shards-0.safetensors ...           the parts that process 0 wrote

What is a part of which tensor, who writes what all hold, and which parts another number of processes needs is planned by PyTorch. Its own
storage pickles; this one does not.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from recsys.core.errors import CheckpointError
from recsys.core.files import read_json, write_bytes, write_json

INDEX = "shards.json"
_SAFE = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)}


class ShardWriter(StorageWriter):
    """Writes every process's parts into a directory, and then the index.

    Args:
        directory: exists, the same for all processes.
        rank: of this process.
        finished: called in the first process once all is written, with the SHA-256 of each file of parts.
    """

    def __init__(self, directory: Path, rank: int, finished: Callable[[dict[str, str]], None]) -> None:
        super().__init__()
        self._directory, self._rank, self._finished = directory, rank, finished

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See `StorageWriter`."""
        file = f"shards-{self._rank}.safetensors"
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            value = planner.resolve_data(item)
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{item.index.fqn}: expected a tensor, got {type(value).__name__}")
            tensors[_key(item.index)] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        content = save(tensors)
        write_bytes(self._directory / file, content)
        told = {"file": file, "sha256": hashlib.sha256(content).hexdigest()}
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, _size(item), told) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See `StorageWriter`."""
        written = {result.index: result.storage_data for own in results for result in own}
        index: dict[str, Any] = {}
        for name, about in metadata.state_dict_metadata.items():
            if not isinstance(about, TensorStorageMetadata):
                raise CheckpointError(f"{name}: expected a tensor")
            parts = []
            for chunk in about.chunks:
                if chunk.sizes.numel() == 0 < about.size.numel():
                    continue  # of a process that has no row of a short tensor
                place = written[MetadataIndex(name, chunk.offsets)] if len(about.size) else written[_scalar(name, written)]
                parts.append({"begin": list(chunk.offsets), "size": list(chunk.sizes), "file": place["file"]})
            index[name] = {"dtype": str(about.properties.dtype), "shape": list(about.size), "parts": parts}
        write_json(self._directory / INDEX, index)
        self._finished({place["file"]: place["sha256"] for place in written.values()})

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left of a checkpoint before."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No id is taken: the directory is given."""
        return False


class ShardReader(StorageReader):
    """Reads what `ShardWriter` wrote, in any number of processes.

    Args:
        directory: of the checkpoint, whose files were found right.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._files: dict[MetadataIndex, str] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `StorageReader`."""
        tensors: dict[str, Any] = {}
        for name, about in read_json(self._directory / INDEX).items():
            chunks = [ChunkStorageMetadata(torch.Size(part["begin"]), torch.Size(part["size"])) for part in about["parts"]]
            tensors[name] = TensorStorageMetadata(TensorProperties(_SAFE[about["dtype"]]), torch.Size(about["shape"]), chunks)
            self._files |= {MetadataIndex(name, part["begin"]): part["file"] for part in about["parts"]}
        return Metadata(tensors)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See `StorageReader`."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise CheckpointError(f"{item.dest_index.fqn}: expected a tensor")
            by_file[self._files[_plain(item.storage_index)]].append(item)
        for file, items in by_file.items():
            with safe_open(self._directory / file, framework="pt") as stored:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(_read(stored, item))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is left of a checkpoint before."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """No id is taken: the directory is given."""
        return False


def load_shards(directory: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of a nested state in place: every process its parts. A collective call.

    Raises:
        CheckpointError: a tensor is absent or has another shape.
    """
    try:
        load(state, storage_reader=ShardReader(directory), planner=DefaultLoadPlanner())
    except CheckpointError:
        raise
    except Exception as error:  # PyTorch wraps what any process raises
        raise CheckpointError(f"{directory}: cannot be loaded: {_first_line(error)}") from error


def shapes(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, by its dotted name."""
    index: Mapping[str, Any] = read_json(directory / INDEX)
    return {name: (tuple(about["shape"]), _SAFE[about["dtype"]]) for name, about in index.items()}


def _key(index: MetadataIndex) -> str:
    """A part's name in its file."""
    begin: Sequence[int] = index.offset or ()
    return f"{index.fqn}@{','.join(map(str, begin))}" if any(begin) else index.fqn


def _plain(index: MetadataIndex) -> MetadataIndex:
    return MetadataIndex(index.fqn, index.offset if index.offset is not None else ())


def _scalar(name: str, written: Mapping[MetadataIndex, Any]) -> MetadataIndex:
    return next(index for index in written if index.fqn == name)


def _size(item: WriteItem) -> int:
    return item.tensor_storage_size() or 0


def _read(stored: Any, item: ReadItem) -> Tensor:
    key = _key(item.storage_index)
    if not item.lengths:
        return stored.get_tensor(key)  # type: ignore[no-any-return]
    places = tuple(slice(begin, begin + length) for begin, length in zip(item.storage_offsets, item.lengths, strict=True))
    return stored.get_slice(key)[places]  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
