"""Connections to the public internet only, for whatever fetches an address that somebody else has named."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import httpcore

from core.errors import FetchFailed, Forbidden

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_IPV6_IN_USE = ipaddress.IPv6Network("2000::/3")
# They carry an IPv4 address inside, which would have to be judged too: 6to4 and Teredo.
_IPV6_TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32"))


def is_public(address: str) -> bool:
    """Whether an address belongs to the internet at large: nothing of this machine, of its networks, or special."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed not in _IPV6_IN_USE or any(parsed in tunnel for tunnel in _IPV6_TUNNELS)
    ):
        return False  # with what is mapped from IPv4
    return parsed.is_global and not (
        parsed.is_private or parsed.is_loopback or parsed.is_link_local or parsed.is_multicast or parsed.is_reserved
    )


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host. Raises `OSError` if there are none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to hosts of the public internet only, or to any with `allow_private`.

    A name is resolved once, every address it has is checked, and the connection goes to the first of those, so that a
    second look-up cannot lead elsewhere; certificates are still checked against the name. Connecting raises `Forbidden`
    for a host that is not public, `FetchFailed` for one without an address.
    """

    def __init__(
        self,
        network: httpcore.AsyncNetworkBackend | None = None,
        *,
        resolver: Resolver = resolve,
        allow_private: bool = False,
    ) -> None:
        self._network = network or httpcore.AnyIOBackend()
        self._resolver = resolver
        self._allow_private = allow_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        address = await self._address(host, port)
        return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)

    async def _address(self, host: str, port: int) -> str:
        try:
            addresses = await self._resolver(host, port)
        except (OSError, UnicodeError):
            addresses = []
        if not addresses:
            raise FetchFailed("the host of the URL has no address; check the URL")
        # One address out of place is enough: a name of good faith has none.
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise Forbidden("the host of the URL is not on the public internet; give one that is")
        return addresses[0]
