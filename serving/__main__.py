# SPDX-License-Identifier: Apache-2.0
"""Serve the champion: ``python -m serving --port 8000``."""

import argparse
import logging
from pathlib import Path

import uvicorn

from recsys.registry import Location, home
from serving.app import create_app
from serving.engine import Engine, load


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="recsys serve", description="Serve a registered bundle over HTTP.")
    parser.add_argument("--model", default="models:/recsys@champion", help="models:/<name>@<alias> or models:/<name>/<version>")
    parser.add_argument("--home", type=Path, default=home(), help="the folder of registry and online stores (RECSYS_HOME)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-waiting", type=int, default=64, help="requests beyond this many are rejected at once")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    location = Location.under(arguments.home)
    engine = Engine(lambda: load(arguments.model, location), max_waiting=arguments.max_waiting)
    uvicorn.run(create_app(engine), host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
