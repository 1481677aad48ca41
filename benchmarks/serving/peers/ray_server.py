# SPDX-License-Identifier: Apache-2.0
"""Ray Serve with batching as its documentation has it: ``@serve.batch``, one replica."""

import os
import signal
import threading

import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.serving.behind import BATCH_REQUESTS, BATCH_SECONDS, HOME, PORT, WAY, Asked, of_environment

VARIABLES = (HOME, WAY, "OMP_NUM_THREADS", "PYTHONPATH")


@serve.deployment(max_ongoing_requests=16 * BATCH_REQUESTS, ray_actor_options={"num_cpus": 0.5})
class Scorer:
    def __init__(self) -> None:
        self.scores = of_environment()

    @serve.batch(max_batch_size=BATCH_REQUESTS, batch_wait_timeout_s=BATCH_SECONDS)
    async def predict(self, asked: list[Asked]) -> list[list[float]]:
        return self.scores(asked)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":  # the health that Serve tells of by itself is its proxy's, which does not wait for a replica
            return Response("ready")
        found = await self.predict(Asked.of(await request.json()))
        return Response(orjson.dumps({"scores": found}), media_type="application/json")


def main() -> None:
    """Serve until SIGTERM comes."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    variables = {name: os.environ[name] for name in VARIABLES}
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ[PORT])})
    serve.run(Scorer.bind(), route_prefix="/predict")
    signal.signal(signal.SIGTERM, lambda *_: ended.set())  # Ray has set a handler of its own meanwhile
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
