# SPDX-License-Identifier: Apache-2.0
"""The server's application under Ray Serve: stateless replicas, each with an engine of its own, behind Ray's HTTP proxies.

Every replica builds what ``python -m serving`` builds (`serving.app.from_environment`), loads its bundle from the registry and follows the
promotion log itself. Batching, deadlines and rejections are the engine's; Ray starts replicas, watches them and hands requests to them.
Settings travel in the environment of the replicas. Secrets do not: each node's own environment has them.
"""

import argparse
import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Self

import httpx
from pydantic import Field, model_validator
from ray import serve
from starlette.types import ASGIApp

from recsys.core.config import Config, parse
from serving.app import from_environment
from serving.settings import Settings, add_options, chosen_of

DEPLOYMENT = "server"


class OnRay(Config):
    """How many replicas run where. Every field has an option of its name."""

    address: str | None = Field(None, description="of a running Ray cluster, such as auto; by default a local one is started")
    name: str = Field("recsys", min_length=1, description="the application's name in Ray Serve")
    replicas: int = Field(1, ge=1, description="that always run")
    most_replicas: int | None = Field(None, ge=1, description="up to so many run when there is much to do; by default as many as always")
    target_requests: float = Field(16.0, gt=0, description="requests under way in a replica on average, above which more replicas start")
    upscale_seconds: float = Field(15.0, ge=0, description="how long there has to be too much to do before more replicas start")
    downscale_seconds: float = Field(600.0, ge=0, description="how long there has to be little to do before a replica ends")
    most_requests: int = Field(1000, ge=1, description="requests under way in a replica at most; the engine rejects long before")
    cpus: float = Field(1.0, ge=0, description="Ray's CPUs for a replica")
    gpus: float = Field(0.0, ge=0, description="Ray's GPUs for a replica")
    start_seconds: float = Field(600.0, gt=0, description="for a replica to load and warm its bundle before Ray tries another")
    health_seconds: float = Field(10.0, gt=0, description="between two health checks of a replica")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(f"most_replicas: expected at least replicas, {self.replicas}, got {self.most_replicas}")
        return self

    @property
    def most(self) -> int:
        """How many replicas there may be."""
        return self.most_replicas or self.replicas

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> tuple[Self, list[str]]:
        """The options that are of this kind, and the arguments that are not.

        Raises:
            ConfigError: a value does not fit; names it.
        """
        parser = argparse.ArgumentParser(
            prog="recsys serve --engine ray",
            description="Serve a registered bundle by replicas under Ray Serve. The options of recsys serve hold for every replica.",
            allow_abbrev=False,
        )
        add_options(parser, cls)
        given, rest = parser.parse_known_args(arguments)
        return parse(cls, chosen_of(given), source="arguments"), rest

    def scaling(self) -> dict[str, Any]:
        """What `serve.deployment` takes of this: a fixed number of replicas, or bounds between which there are as many as needed."""
        if self.most == self.replicas:
            return {"num_replicas": self.replicas}
        bounds = {"min_replicas": self.replicas, "initial_replicas": self.replicas, "max_replicas": self.most}
        delays = {"upscale_delay_s": self.upscale_seconds, "downscale_delay_s": self.downscale_seconds}
        return {"autoscaling_config": bounds | delays | {"target_ongoing_requests": self.target_requests}}


class Replica:
    """One replica. `serve.ingress` gives it its application.

    Args:
        start_seconds: for the application to be ready for the first time.
    """

    app: ASGIApp

    def __init__(self, start_seconds: float) -> None:
        self._start_seconds = start_seconds
        self._started = False
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every check

    async def check_health(self) -> None:
        """Whether ``/readyz`` says yes, asked without a network. Ray asks before it sends the first request, and ends what often says no.

        Raises:
            RuntimeError: it says no; the first time, after it was asked for ``start_seconds``.
        """
        until = time.monotonic() + (0.0 if self._started else self._start_seconds)
        while (answer := await self._readyz()).status_code != 200:
            if time.monotonic() >= until:
                raise RuntimeError(f"/readyz: {answer.status_code}: {answer.text}")
            await asyncio.sleep(0.1)
        self._started = True

    async def _readyz(self) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://replica") as client:
            return await client.get("/readyz")


def for_replicas(settings: Settings, options: OnRay) -> Settings:
    """The settings of each replica.

    A replica that is not ready is ended by Ray, which brings no feature store back: so the store has no part in that here. Events that one
    replica holds are not seen by the others. Paths do not depend on where a process was started.
    """
    paths = {
        name: value.resolve() for name in ("home", "decisions", "access", "canary_policy") if (value := getattr(settings, name)) is not None
    }
    several = {"events": "off"} if settings.events == "auto" and options.most > 1 else {}
    return settings.model_copy(update={"ready_needs_store": False, "workers": 1, **paths, **several})


def application(options: OnRay) -> Any:
    """With the settings of the environment, as ``serve run serving.deploy.ray_serve:application replicas=2`` and KubeRay call it."""
    return built(options, Settings.from_environment())


def built(options: OnRay, settings: Settings) -> Any:
    """The application that `serve.run` takes.

    Args:
        options: how many replicas, and where.
        settings: of the server.
    """
    own = for_replicas(settings, options)
    deployment = serve.deployment(
        serve.ingress(from_environment)(Replica),
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus, "runtime_env": {"env_vars": own.environment()}},
        max_ongoing_requests=options.most_requests,
        health_check_period_s=options.health_seconds,
        # Ray sends nothing more, waits for what is under way, and then ends the application, which stops its engine.
        graceful_shutdown_wait_loop_s=max(own.grace_seconds, 0.1),
        graceful_shutdown_timeout_s=own.grace_seconds + own.drain_seconds,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
        **options.scaling(),
    )
    return deployment.bind(options.start_seconds)
