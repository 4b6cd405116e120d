"""`python -m benchmarks.mortal_service serve ...`: the service, whose engine thread dies of the next batch at SIGUSR1.

What a fault in a native library would do to it cannot be had from outside; all else is `wikiclip serve` as it is.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import service.loaded_bundle
from wikiclip.cli import main as wikiclip_main

_condemned = threading.Event()


class _Mortal:
    """An encoder as it is, but for the one pass after the signal."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, pixels_BHW3: Any) -> Any:
        if _condemned.is_set():
            _condemned.clear()
            raise SystemExit("killed by the benchmark")
        return self._encoder.encode(pixels_BHW3)


def main() -> None:
    """What the process does."""
    open_encoder = service.loaded_bundle.open_encoder
    service.loaded_bundle.open_encoder = lambda *arguments: _Mortal(open_encoder(*arguments))  # type: ignore[assignment]
    signal.signal(signal.SIGUSR1, lambda *_: _condemned.set())
    wikiclip_main()


if __name__ == "__main__":
    main()
