"""An httpcore network backend that connects only to the public internet, for fetching URLs given by others."""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import httpcore

from core.errors import FetchFailed, Forbidden

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_IPV6_IN_USE = ipaddress.IPv6Network("2000::/3")
# 6to4 and Teredo addresses contain an IPv4 address that could be private.
_IPV6_TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32"))
# Services that give a machine of a cloud its credentials. Azure's has an address that counts as public.
_METADATA = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd20:ce::254",
    )
)


def is_public(address: str) -> bool:
    """Return whether an address is on the public internet: not local, private, reserved, multicast or a tunnel."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and (
        parsed not in _IPV6_IN_USE or any(parsed in tunnel for tunnel in _IPV6_TUNNELS)
    ):
        return False  # this includes IPv4-mapped addresses
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or is_metadata(address))


def is_metadata(address: str) -> bool:
    """Return whether an address is a cloud's metadata service, also in an IPv6 form of an IPv4 address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    forms: list[ipaddress.IPv4Address | ipaddress.IPv6Address | None] = [parsed]
    if isinstance(parsed, ipaddress.IPv6Address):
        # Mapped and NAT64 addresses end in the IPv4 address.
        forms += [ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF), parsed.sixtofour, *(parsed.teredo or ())]
    return any(form in network for form in forms if form is not None for network in _METADATA)


async def resolve(host: str, port: int) -> list[str]:
    """Return all addresses of a host. Raises `OSError` if it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connect only to hosts on the public internet, or with `allow_private` to any but metadata services of clouds.

    Each host name is resolved once. All of its addresses are checked, and the connection uses the first of them, so a
    second DNS answer cannot redirect it. TLS certificates are still checked against the name.

    Connecting raises `Forbidden` for a host that is not public and `FetchFailed` for one without an address.
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
        # A single private address is enough to refuse: an honest public host has none.
        allowed = (lambda each: not is_metadata(each)) if self._allow_private else is_public
        if not all(map(allowed, addresses)):
            raise Forbidden("the host of the URL is not on the public internet; give one that is")
        return addresses[0]
