# SPDX-License-Identifier: Apache-2.0
"""The generator in a process of its own, on a core of its own: ``generator.py CORE``.

Requests: ``requests`` (a file of bodies and what they are sent with), ``open`` and ``closed`` (see `benchmarks.serving.load`).
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.serving.load import OpenLoop, as_json, closed_loop, encoded, poisson
from benchmarks.worker import serve


class Generator:
    """Holds encoded requests by name, and sends them."""

    def __init__(self) -> None:
        self._requests: dict[str, list[bytes]] = {}

    def handle(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        match request["do"]:
            case "requests":
                bodies = Path(request["file"]).read_bytes().splitlines()
                self._requests[request["name"]] = [encoded(request["path"], body, request["headers"]) for body in bodies]
                return {"count": len(bodies)}
            case "open":
                due = request.get("due") or poisson(request["rate"], request["seconds"], request["seed"])
                marks = [mark.encode() for mark in request["lesser"]]
                load = OpenLoop(
                    request["port"],
                    self._requests[request["name"]],
                    due,
                    give_up=request["give_up"],
                    lesser=marks,
                    most=request["connections"],
                )
                return as_json(asyncio.run(load.run(request["seconds"])))
            case "closed":
                asked = closed_loop(request["port"], self._requests[request["name"]], request["clients"], request["seconds"])
                return as_json(asyncio.run(asked))
            case other:
                raise ValueError(f"unknown request {other!r}")


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    serve(Generator().handle)
