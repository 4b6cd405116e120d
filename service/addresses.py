"""Which hosts images may be fetched from."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


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
