# SPDX-License-Identifier: Apache-2.0
"""The part of a ranker that becomes a graph: from looked-up vectors to logits, for any number of rows, of events and of their pairs.

The tables stay outside and are looked up eagerly, for three reasons: their weights would become constants of the artifact, so that it
would hold a copy of what is mapped and shared otherwise; FBGEMM's look-ups, int8 ones among them, do not export (their modules hold script
objects without a fake class); and there is nothing to be fused in a look-up. Which of its vectors a row reads (`Reads`) is worked out
beside the tables, since how many pairs there are depends on the data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from recsys.core.errors import RecsysError
from recsys.efficiency.view import offsets_of
from recsys.ranking.history import Histories, Reads
from recsys.ranking.model import Ranker
from recsys.ranking.vectors import Vectors

Span: TypeAlias = Literal["vectors", "fields"]
"""Where the graph begins: at the vectors that were looked up, or behind the history encoders, at the vectors of the fields."""

LEAST = 2  # of rows, events and pairs: a graph that is captured for several holds for any number from here on
_Parts: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # lengths, row and event of `Reads`, offsets and rows of `Histories`


class FromVectors(nn.Module):
    """Logits ``[R, tasks]`` of `Vectors`, taken apart into tensors.

    Args:
        ranker: in evaluation mode. Its tables are no part of this.
    """

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker.with_tables(nn.Module())

    def forward(self, pooled: Tensor, dense: Tensor, values: dict[str, Tensor], reads: dict[str, _Parts]) -> Tensor:
        """See `arguments`."""
        of_sequences = {name: Reads(*parts[:3], Histories(*parts[3:])) for name, parts in reads.items()}
        inputs = Vectors(pooled, values, of_sequences, dense)
        return self.ranker.interact(self.ranker.fields_of(inputs))


class FromFields(nn.Module):
    """Logits ``[R, tasks]`` of the fields' vectors ``[R, W]``; see `FromVectors`."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.ranker = ranker.with_tables(nn.Module())

    def forward(self, fields: Tensor) -> Tensor:
        """The logits."""
        return self.ranker.interact(fields)


@dataclass(frozen=True)
class Captured:
    """A graph and where it begins.

    Attributes:
        program: what `torch.export` made.
        span: where it begins.
        passed_over: why it does not begin earlier; None where it does.
    """

    program: ExportedProgram
    span: Span
    passed_over: str | None = None


def capture(ranker: Ranker) -> Captured:
    """The largest part of a ranker that exports: from its vectors on, or else from its fields on.

    Args:
        ranker: in evaluation mode.

    Raises:
        RecsysError: neither exports; names both reasons.
    """
    try:
        return Captured(export(ranker, "vectors"), "vectors")
    except Exception as error:
        first = _told(error)
    try:
        return Captured(export(ranker, "fields"), "fields", first)
    except Exception as error:
        raise RecsysError(
            f"ranker: expected a part that exports; from its vectors on: {first}; from its fields on: {_told(error)}"
        ) from None


@torch.no_grad()
def export(ranker: Ranker, span: Span) -> ExportedProgram:
    """The graph that begins where it is said; whatever `torch.export` raises where there is none."""
    example = _example(ranker)
    if span == "fields":
        fields = ranker.fields_of(example)
        return torch.export.export(FromFields(ranker), (fields,), dynamic_shapes=({0: Dim("rows", min=LEAST)},), strict=False)
    return torch.export.export(FromVectors(ranker), arguments(example), dynamic_shapes=_shapes(ranker, example), strict=False)


def arguments(inputs: Vectors) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, _Parts]]:
    """What `FromVectors` takes: of each sequence all that `Reads` may hold, whether its rows share histories or not."""
    values = {key: inputs.values[key].contiguous() for key in sorted(inputs.values)}
    return (
        inputs.pooled.contiguous(),
        inputs.dense.contiguous(),
        values,
        {name: _parts(inputs.reads[name]) for name in sorted(inputs.reads)},
    )


def fits(inputs: Vectors) -> bool:
    """Whether there are as many rows, events and pairs as a graph holds for."""
    return all(size >= LEAST for size in _sizes(inputs))


def _parts(reads: Reads) -> _Parts:
    lengths, here = reads.lengths.long(), reads.row.device
    event = torch.arange(len(reads.row), device=here) if reads.event is None else reads.event
    histories = reads.histories or Histories(offsets_of(lengths), torch.arange(len(lengths), device=here))
    offsets = histories.offsets
    if len(offsets) <= LEAST:  # one history; an empty one behind it makes two
        offsets = torch.cat([offsets, offsets[-1:]])
    return lengths, reads.row, event, offsets, histories.of_row


def _sizes(inputs: Vectors) -> Iterator[int]:
    yield len(inputs.dense)
    yield from (len(vectors) for vectors in inputs.values.values())
    yield from (len(reads.row) for reads in inputs.reads.values())


def _example(ranker: Ranker) -> Vectors:
    """Inputs of which no two numbers that may differ are equal."""
    spec, widths = ranker.spec, ranker.tables.widths
    of_row = torch.tensor([0, 0, 1, 2, 2])
    rows = len(of_row)
    values: dict[str, Tensor] = {}
    reads: dict[str, Reads] = {}
    for position, sequence in enumerate(spec.sequences):
        lengths = torch.tensor([3 + 2 * position, 2, 2 + 4 * position])
        values |= {key: torch.zeros(int(lengths.sum()), widths[key]) for key in sequence.keys}
        values[sequence.target] = torch.zeros(rows, widths[sequence.target])
        reads[sequence.name] = Reads.shared(lengths, of_row)
    pooled = torch.zeros(rows, sum(widths[key] for key in spec.bag_keys))
    return Vectors(pooled, values, reads, torch.zeros(rows, len(spec.dense)))


def _shapes(ranker: Ranker, example: Vectors) -> tuple[Any, ...]:
    """Which axes of `arguments` vary, and which of them vary together."""
    rows = {0: Dim("rows", min=LEAST)}
    events: dict[str, Mapping[int, Any]] = dict.fromkeys((s.target for s in ranker.spec.sequences), rows)
    reads: dict[str, tuple[Mapping[int, Any], ...]] = {}
    for position, sequence in enumerate(ranker.spec.sequences):
        of_events = {0: Dim(f"events_{position}", min=LEAST)}
        events |= dict.fromkeys(sequence.keys, of_events)
        pairs, bounds = {0: Dim(f"pairs_{position}", min=LEAST)}, {0: Dim(f"bounds_{position}", min=LEAST + 1)}
        reads[sequence.name] = (rows, pairs, pairs, bounds, rows)
    return rows, rows, {key: events[key] for key in sorted(example.values)}, {name: reads[name] for name in sorted(reads)}


def _told(error: Exception) -> str:
    """The first line of an error, which may be pages long."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
