# SPDX-License-Identifier: Apache-2.0
"""While a batch is trained, the next one is copied to the device, and its ids go to the processes that hold their rows.

TorchRec's ``TrainPipelineSparseDist`` has the stages of a step: copy, start of the sparse all-to-all (how many ids go where), its second
half (the ids themselves), forward, backward, update; the first three on streams of their own where there is a GPU. Its ``progress`` runs
them all, and has no place for the guards of `recsys.training.loop`. So the stages before the forward pass are TorchRec's, called from here,
and the others are the loop's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torchrec.distributed.train_pipeline.pipeline_context import TrainPipelineContext
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.utils import _wait_for_batch
from torchrec.distributed.types import ShardedModule

from recsys.core.errors import DataError
from recsys.data.loader import Loader
from recsys.embedding.tables import EmbeddingTables
from recsys.training.feed import Feed


@dataclass
class _Taken:
    """A batch that was taken from the loader.

    Attributes:
        host: as the loader gave it.
        batch: on the device, or on its way there.
        context: TorchRec's, of the batch's way through the stages.
        cursor: the loader's, behind the batch.
        started: whether its ids are on their way.
        wrong: why it is to be left out.
    """

    host: Any
    batch: Any
    context: TrainPipelineContext
    cursor: dict[str, int]
    started: bool = False
    wrong: DataError | None = None


class Ahead(Feed):
    """A feed that takes each batch one step before it is wanted. Its cursor is that of the batches given, not of those taken.

    All processes make the same calls, and `around` is a collective one. Once the feed is closed, the model's look-ups are as they were.

    Args:
        loader: see `Feed`.
        model: with tables that `recsys.embedding.sharding.shard` has split.
        device: see `Feed`.
        look: raises a `DataError` in all processes where one of them has a batch that is not as it should be.
    """

    def __init__(self, loader: Loader[Any], model: nn.Module, device: torch.device, look: Callable[[Any], None]) -> None:
        super().__init__(loader, device)
        self._stages, self._look = _Stages(_LookUps(model), device), look
        self._begun, self._cursor = False, loader.state_dict()
        self._now: _Taken | None = None
        self._then: _Taken | None = None

    def __next__(self) -> Any:
        if not self._begun:
            self._begun, self._then = True, self._take()
        if self._then is None:
            raise StopIteration
        self._now, self._then = self._then, None
        self._then = self._take()
        self._cursor = self._now.cursor
        return self._now.batch

    def _take(self) -> _Taken | None:
        host = next(self._batches, None)
        if host is None:
            return None
        cursor = self._loader.state_dict()
        batch, context = self._stages.copied(host)
        return _Taken(host, batch, context, cursor)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around the forward pass of the batch given last: the ids of the next one are on their way meanwhile.

        Raises:
            DataError: the batch is not as it should be, here or in another process.
        """
        now, then = self._now, self._then
        if now is None:
            raise RuntimeError("no batch was given yet")
        if self._start(now):
            self._stages.wait_sparse_data_dist(now.context)
        if now.wrong is not None:
            raise now.wrong
        waiting = then is not None and self._start(then)
        self._stages.enter(now.batch, now.context)
        yield
        if then is not None and waiting:
            self._stages.wait_sparse_data_dist(then.context)

    def _start(self, taken: _Taken) -> bool:
        """Let the ids of a batch go, unless they have; whether they went."""
        if taken.started or taken.wrong is not None:
            return False
        try:
            self._look(taken.host)
        except DataError as error:
            taken.wrong = error
            return False
        self._stages.begin(taken.batch, taken.context)
        taken.started = True
        return True

    def state_dict(self) -> dict[str, int]:
        """The loader's cursor behind the batch that was given last."""
        return self._cursor

    def close(self) -> None:
        """See `Feed.close`. What was taken and not given is left to be taken again."""
        self._now = self._then = None
        self._stages.detach()
        super().close()


class _Stages(TrainPipelineSparseDist):
    """The stages of TorchRec's pipeline before the forward pass."""

    def __init__(self, look_ups: "_LookUps", device: torch.device) -> None:
        super().__init__(look_ups, optimizer=cast(Any, None), device=device)  # which `progress` alone would use

    def copied(self, batch: Any) -> tuple[Any, TrainPipelineContext]:
        """The batch on the device, or on its way there, and a context for the way that is before it."""
        return self.copy_batch_to_gpu(iter((batch.pin_memory() if self._device.type == "cuda" else batch,)))  # type: ignore[no-any-return]

    def begin(self, batch: Any, context: TrainPipelineContext) -> None:
        """Start the all-to-all of a batch; the first one also puts TorchRec's look-ups into the place of the model's."""
        self._init_pipelined_modules(batch, context, self._pipelined_forward_type)

    def enter(self, batch: Any, context: TrainPipelineContext) -> None:
        """Let the look-ups read the rows of this batch, as soon as they are there."""
        _wait_for_batch(batch, self._data_dist_stream)
        self._set_module_context(context)


class _LookUps(nn.Module):
    """The sharded collections of a model, and what of a batch each reads.

    TorchRec learns that from a trace (torch.fx) of the model's forward pass. A training loss here looks at values, such as whether labels
    are in range, which a trace does not have; so this is what is traced in its place. The collections are the model's own.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tables = [module for module in model.modules() if isinstance(module, EmbeddingTables)]
        self.pooled = nn.ModuleList(part for one in tables for part in _sharded(one.pooled))
        self.unpooled = nn.ModuleList(part for one in tables for part in _sharded(one.unpooled))

    def forward(self, batch: Any) -> list[Any]:
        """All look-ups of a batch, which nobody calls for."""
        return [part(batch.sparse) for part in self.pooled] + [part(batch.sequences) for part in self.unpooled]


def _sharded(module: nn.Module | None) -> list[nn.Module]:
    return [] if module is None else [part for part in module.modules() if isinstance(part, ShardedModule)]
