# SPDX-License-Identifier: Apache-2.0
"""Serve the champion: ``python -m serving --port 8000``. Every option is a field of `serving.settings.Settings`."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from recsys.core.errors import ConfigError
from serving.logs import configure_logs
from serving.security.exposure import check_exposure
from serving.security.protocol import BoundedProtocol
from serving.settings import Settings

METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported, so not before the workers
_WORKER_SECONDS = 60
"""In which a worker must answer whoever watches it: on a busy host its imports alone take longer than uvicorn's five."""


def main() -> None:
    """The command."""
    try:
        settings = Settings.from_arguments()
        check_exposure(settings)
    except ConfigError as error:
        sys.exit(f"recsys serve: {error}")
    os.environ |= settings.environment()
    configure_logs(settings.log_format)
    # Once uvicorn has drained, it raises the signal that ended it again, for whoever had a handler before: an orderly end is status 0.
    signal.signal(signal.SIGTERM, _end)
    with shared_metrics(settings.workers):
        uvicorn.run(
            "serving.app:from_environment",
            factory=True,
            host=settings.host,
            port=settings.port,
            http=BoundedProtocol,
            ws="none",
            workers=settings.workers,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=settings.drain_seconds,
            timeout_worker_healthcheck=_WORKER_SECONDS,
        )


@contextmanager
def shared_metrics(workers: int) -> Iterator[None]:
    """Where several workers count together; the folder is removed at the end."""
    if workers == 1 or METRICS_FOLDER in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="recsys-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        yield


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
