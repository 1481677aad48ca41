# SPDX-License-Identifier: Apache-2.0
"""Serve the champion by replicas under Ray Serve: ``recsys serve --engine ray --replicas 2``, or ``python -m serving.deploy``.

Runs until SIGTERM or SIGINT, then ends the application, each replica after what it has under way.
"""

import logging
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType

from ray import serve

from recsys.core.engine import Engine, started
from recsys.core.errors import ConfigError
from serving.__main__ import shared_metrics
from serving.deploy.ray_serve import OnRay, built
from serving.security.exposure import check_exposure
from serving.settings import Settings

log = logging.getLogger("serving")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        options, rest = OnRay.from_arguments(sys.argv[1:] if arguments is None else arguments)
        settings = Settings.from_arguments(rest)
        if settings.workers != 1:
            raise ConfigError(f"workers: expected 1 under Ray Serve, which has replicas in their place, got {settings.workers}")
        check_exposure(settings)
    except ConfigError as error:
        sys.exit(f"recsys serve: {error}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s")
    # Replicas of one machine count together; on a cluster each counts for itself.
    counting = shared_metrics(options.most) if options.address is None else nullcontext()
    engine = Engine(name="ray", workers=max(1, math.ceil(options.most * options.cpus)), address=options.address)
    with counting, started(engine, told=True), _running(options, settings):
        log.info("serving at %s:%d", settings.host, settings.port)
        threading.Event().wait()


@contextmanager
def _running(options: OnRay, settings: Settings) -> Iterator[None]:
    """The application, ready to be asked; Ray Serve itself ends as well where its cluster is ours."""
    # After Ray has set its own.
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
        serve.run(built(options, settings), name=options.name, route_prefix="/")
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        serve.delete(options.name)
        if options.address is None:
            serve.shutdown()


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
