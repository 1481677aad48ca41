# SPDX-License-Identifier: Apache-2.0
"""What the server logs: lines of JSON, or of text, that name requests and never who asked for what.

A line is a message and, from ``extra={"fields": {...}}``, fields. Of an exception it has the types and the places, and not the messages,
which may quote a request. Messages themselves must hold no ids of users, items of histories, keys, tokens or bodies.
"""

import logging
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, TypeAlias

import orjson
from opentelemetry import trace

from recsys.core.errors import RecsysError
from recsys.inference.request import InvalidRequest
from serving.tracing import trace_id_of

LogFormat: TypeAlias = Literal["json", "text"]
FIELDS = "fields"
"""The attribute of a record that holds its fields."""

_MOST_CAUSES = 5


def configure_logs(form: LogFormat) -> None:
    """Send all logs of this process to its standard error, in one form. Handlers that libraries have set are replaced."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def named(error: BaseException) -> str:
    """An error in one line of a log: its type, and its message only where that is ours and quotes no request."""
    ours = isinstance(error, RecsysError) and not isinstance(error, InvalidRequest)
    return f"{type(error).__name__}: {error}" if ours else type(error).__name__


class JsonLines(logging.Formatter):
    """A record as one line of JSON: ``time``, ``level``, ``logger``, ``process``, ``message``, its fields, ``trace_id``, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": _message(record),
            **_fields(record),
        }
        if record.exc_info is not None and record.exc_info[1] is not None:
            line["exception"] = [{"type": kind, "at": places} for kind, places in _causes(record.exc_info[1])]
        return orjson.dumps(line, default=str).decode()


class TextLines(logging.Formatter):
    """A record as a line of text with its fields behind the message; of an exception, a line for each place."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = [f"{name}={value}" for name, value in _fields(record).items() if value is not None]
        line = " ".join([_time(record).replace("T", " "), str(record.process), record.name, record.levelname, _message(record), *fields])
        if record.exc_info is None or record.exc_info[1] is None:
            return line
        causes = [[f"  {kind}", *(f"    {place}" for place in places)] for kind, places in _causes(record.exc_info[1])]
        return "\n".join([line, *(each for cause in causes for each in cause)])


def _time(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _message(record: logging.LogRecord) -> str:
    # What asyncio says of a task that failed has the message of its exception in the further lines.
    text = record.getMessage()
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = dict(getattr(record, FIELDS, {}))
    if "trace_id" not in fields and (trace_id := trace_id_of(trace.get_current_span())) is not None:
        fields["trace_id"] = trace_id
    return fields


def _causes(error: BaseException) -> Iterator[tuple[str, list[str]]]:
    """The type of an exception and its places, the innermost last; then those of what caused it."""
    cause: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if cause is None:
            return
        yield type(cause).__name__, _places(cause.__traceback__)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _places(at: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(at)]
