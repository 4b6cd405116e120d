"""Which hosts and network addresses images may be fetched from."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_IPV6_IN_USE = ipaddress.IPv6Network("2000::/3")
# They carry an IPv4 address inside, which would have to be judged too: 6to4 and Teredo.
_IPV6_TUNNELS = (ipaddress.IPv6Network("2002::/16"), ipaddress.IPv6Network("2001::/32"))


def host_pattern(text: str) -> str:
    """An entry of the allow-list, in lower case: a host, or `*.` and a suffix. Raises `ValueError` if it is neither."""
    pattern = text.lower()
    if not _HOST.fullmatch(pattern.removeprefix("*.")):
        raise ValueError("give hosts as images.example.org or *.example.org, without scheme, port or path")
    return pattern


def host_allowed(host: str, patterns: Sequence[str]) -> bool:
    """Whether a host stands on the list. `*.example.org` lets in what is below example.org, not itself."""
    return _HOST.fullmatch(host) is not None and any(
        host.endswith(pattern[1:]) and host != pattern[1:] if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )


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
