# SPDX-License-Identifier: Apache-2.0
"""The lanes of a server whose champion is followed."""

from recsys.core.config import parse
from recsys.core.files import read_json
from serving.engine.source import RegistrySource
from serving.engine.swap import KeepUp
from serving.lanes.canary import Canary
from serving.lanes.lane import Lane
from serving.lanes.policy import CanaryPolicy
from serving.lanes.shadow import Shadow
from serving.settings import Settings


def lanes_of(source: RegistrySource, settings: Settings, keep_up: KeepUp) -> tuple[Canary, Shadow] | None:
    """The canary and the shadow of the model whose champion a source follows; None where it follows none.

    Raises:
        ConfigError: the file of the policy holds none.
        OSError: it cannot be read.
    """
    model = source.followed
    if model is None:
        return None
    policy = CanaryPolicy()
    if settings.canary_policy is not None:
        policy = parse(CanaryPolicy, read_json(settings.canary_policy), source=str(settings.canary_policy))
    rows, retry = settings.max_batch_rows, settings.retry_seconds
    canary = Lane(lambda: source.registry.log.canary(model), source.load, most_rows=rows, retry_seconds=retry, keep_up=keep_up)
    # A shadow answers one request at a time.
    shadow = Lane(lambda: source.registry.log.shadow(model), source.load, most_rows=1, retry_seconds=retry, keep_up=keep_up)
    return (
        Canary(canary, lambda: source.registry, policy, settings.poll_seconds),
        Shadow(shadow, settings.shadow_requests, settings.poll_seconds),
    )
