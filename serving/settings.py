# SPDX-License-Identifier: Apache-2.0
"""How the server runs: one typed set of settings.

They come from options (``--max-batch-rows``) and, where there is none, from the environment (``RECSYS_SERVE_MAX_BATCH_ROWS``), through
which worker processes get theirs.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from recsys.core.config import Config, parse
from recsys.registry.location import HOME, home

PREFIX = "RECSYS_SERVE_"


class Settings(Config):
    """The settings. Every field has an option and an environment variable of its name."""

    model: str = Field("models:/recsys@champion", description="models:/<name>@<alias> or models:/<name>/<version>")
    home: Path = Field(default_factory=home, description=f"the folder of registry and online stores ({HOME})")
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="the port to listen on")
    workers: int = Field(1, ge=1, description="processes that share the port")

    mmap: bool = Field(True, description="whether what is only read of a bundle is mapped, so that processes of a host share it")
    quantize: Literal["int8"] | None = Field(None, description="int8 keeps the ranker's tables in a quarter of the memory")
    compile: bool = Field(False, description="whether the ranker is compiled for this host, half a minute for each new bundle")
    decisions: Path | None = Field(None, description="the folder of the decision log; none is written by default")
    decision_share: float = Field(0.01, ge=0, le=1, description="of requests whose features and candidates are logged, too")

    max_batch_rows: int = Field(2048, ge=1, description="candidates of all requests of a batch together")
    max_delay_ms: float = Field(2.0, ge=0, description="how long the first request of a batch waits for others")
    queue_rows: int | None = Field(None, ge=1, description="candidates that may wait; by default four batches")
    recommend_deadline_ms: float = Field(120.0, gt=0, description="of /v1/recommend, where a request asks for none")
    rank_deadline_ms: float = Field(50.0, gt=0, description="of /v1/rank, where a request asks for none")
    largest_deadline_ms: float = Field(10_000.0, gt=0, description="what a request may ask for at most; more is cut to this")
    reserve_ms: float = Field(10.0, ge=0, description="kept of a deadline for the fallback list")

    read_share: float = Field(0.5, gt=0, le=1, description="of the time that is left, what one read of features may take")
    read_threads: int = Field(4, ge=1, description="threads that read features")
    breaker_failures: int = Field(5, ge=1, description="failed reads in a row after which the store is left alone")
    breaker_seconds: float = Field(2.0, gt=0, description="how long it is left alone before one read tries it again")
    remembered_users: int = Field(10_000, ge=1, description="users whose last features are kept for when the store fails")
    cached_candidates: int = Field(10_000, ge=1, description="retrieved lists that are kept with each bundle")
    ready_needs_store: bool = Field(True, description="whether /readyz fails while the store is left alone")

    events: Literal["auto", "off", "held", "store"] = Field(
        "auto", description="where /v1/events go: held in this process, or to the online store; auto holds them where one worker runs"
    )
    held_events: int = Field(100_000, ge=1, description="events that are held; the oldest give way")

    access: Path | None = Field(None, description="a JSON file of API keys' hashes and accepted tokens; by default anybody may ask")
    insecure: bool = Field(False, description="listen on an address of other machines although anybody may ask")
    body_bytes: int = Field(1_000_000, ge=1, description="of a request's body, at most")
    header_bytes: int = Field(16_384, ge=256, description="of a request's line and headers together, at most")
    json_depth: int = Field(16, ge=2, description="lists and objects within each other in a request's body, at most")
    head_seconds: float = Field(10.0, gt=0, description="for the headers of a request to come")
    body_seconds: float = Field(10.0, gt=0, description="for the body of a request to come")

    catalogue_seconds: float = Field(0.25, gt=0, description="how often the log of catalogue changes is looked into")
    admin: bool = Field(False, description="whether /admin is offered, to whoever reaches the port")
    admin_port: int | None = Field(
        None, ge=1, le=65535, description="a port of its own for /admin, which the other one then does not offer"
    )
    admin_host: str = Field("127.0.0.1", description="the address to listen on for it")

    canary_policy: Path | None = Field(None, description="a JSON file of steps and guardrails of canaries, for other than the defaults")
    shadow_requests: int = Field(100, ge=1, description="that may wait for a shadow; more are not copied to it")

    log_format: Literal["json", "text"] = Field("text", description="one line of JSON for each record of the log, or of text")
    log_requests: Literal["all", "errors"] = Field("all", description="which requests have a line; of probes only those that fail")

    poll_seconds: float = Field(1.0, gt=0, description="how often the promotion log is asked who the champion is")
    retry_seconds: float = Field(5.0, gt=0, description="between attempts to load a bundle that failed")
    keep_previous_seconds: float = Field(600.0, ge=0, description="how long the former champion stays warm for a rollback")
    grace_seconds: float = Field(1.0, ge=0, description="between SIGTERM, when /readyz fails, and the end of accepting requests")
    drain_seconds: int = Field(30, ge=1, description="how long requests under way may take to end after that")

    @property
    def most_waiting_rows(self) -> int:
        """How many candidates may wait."""
        return self.queue_rows or 4 * self.max_batch_rows

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        if self.admin_port is not None and self.admin_port == self.port:
            raise ValueError(f"admin_port: expected another port than {self.port}, which is the public one")
        return self

    @property
    def events_go(self) -> Literal["off", "held", "store"]:
        """Where events go: what a process holds, other workers do not see."""
        if self.events != "auto":
            return self.events
        return "held" if self.workers == 1 else "off"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """The settings of ``RECSYS_SERVE_*``.

        Raises:
            ConfigError: a variable names no setting, or has a value that does not fit; names it.
        """
        return parse(cls, _given(os.environ if environment is None else environment), source="environment")

    @classmethod
    def from_arguments(cls, arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> Self:
        """The settings of the command line, then of the environment.

        An unknown option ends the program; errors otherwise as for `from_environment`.
        """
        epilog = "With --engine ray it is served by replicas under Ray Serve: recsys serve --engine ray --help"
        parser = argparse.ArgumentParser(prog="recsys serve", description="Serve a registered bundle over HTTP.", epilog=epilog)
        add_options(parser, cls)
        chosen = chosen_of(parser.parse_args(arguments))
        return parse(cls, _given(os.environ if environment is None else environment) | chosen, source="arguments and environment")

    def environment(self) -> dict[str, str]:
        """The variables from which `from_environment` makes the same settings."""
        return {PREFIX + name.upper(): str(value) for name, value in self.model_dump(mode="json").items() if value is not None}


def add_options(parser: argparse.ArgumentParser, config: type[Config]) -> None:
    """Add an option for every field of a configuration, with its name, its description and its default."""
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{field.description} (default: {default})", metavar="VALUE")


def chosen_of(arguments: argparse.Namespace) -> dict[str, str]:
    """The options of `add_options` that were given, by the names of their fields."""
    return {name: value for name, value in vars(arguments).items() if value is not None}


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)}
