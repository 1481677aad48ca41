# SPDX-License-Identifier: Apache-2.0
"""A server that other machines reach asks who its callers are, unless it is told not to."""

import ipaddress

from recsys.core.errors import ConfigError
from serving.security.credentials import Credentials
from serving.settings import Settings


def check_exposure(settings: Settings) -> None:
    """Hold that a server may start as it is set.

    Raises:
        ConfigError: it would listen to other machines and answer anybody; or nobody could be told by its access file.
    """
    if settings.access is not None:
        Credentials.read(settings.access)
        return
    hosts = {"host": settings.host, **({} if settings.admin_port is None else {"admin_host": settings.admin_host})}
    for name, host in hosts.items():
        if not settings.insecure and not is_local(host):
            raise ConfigError(
                f"{name}: {host} is reached from other machines, and anybody could ask: expected --access FILE, or --insecure true"
            )


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
