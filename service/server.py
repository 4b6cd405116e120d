"""Run the app under uvicorn."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from core.errors import UserError
from service.app import create_app
from service.protocol import GuardedHttpProtocol
from service.recognizer import Recognizer
from service.settings import Settings
from service.telemetry import configure_logging

_GC_THRESHOLD = 20_000  # allocations minus deallocations that start a collection

log = logging.getLogger("wikiclip.service")


def run_server(settings: Settings) -> None:
    """Serve until a signal stops the process. Raises `UserError` for a missing or bad bundle or a used address."""
    if settings.bundle is None:
        raise UserError("there is no bundle to serve; name one with --bundle or WIKICLIP_BUNDLE")
    configure_logging(settings.log_level)
    with bind(settings.host, settings.port) as listener:
        # Imported modules are excluded from garbage collection, but not the bundle, which may be swapped out later.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD, 10, 10)
        recognizer = Recognizer.open(settings.bundle, settings)
        host, port = listener.getsockname()[:2]
        log.info("serving %s on http://%s:%d", recognizer.label, f"[{host}]" if ":" in host else host, port)
        config = server_config(settings, create_app(settings, recognizer))
        _Server(config, recognizer, settings.bundle).run(sockets=[listener])


def server_config(settings: Settings, app: ASGIApp) -> uvicorn.Config:
    """Return uvicorn's configuration for the app."""
    # On SIGTERM, requests in flight finish. Each may first fetch an image, then take up to its deadline.
    shutdown_ms = settings.deadline_ms + (settings.url_timeout_ms if settings.url_allowlist else 0)
    protocol = partial(GuardedHttpProtocol, timeout_s=settings.receive_timeout_ms / 1000)
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], protocol),
        log_config=None,
        ws="none",
        access_log=False,  # service.middleware writes the access log
        server_header=False,
        timeout_graceful_shutdown=shutdown_ms // 1000 + 1,
    )


class _Server(uvicorn.Server):
    """Makes the service unready when shutdown begins, and reloads the configured bundle on SIGHUP."""

    def __init__(self, config: uvicorn.Config, recognizer: Recognizer, bundle: Path | str) -> None:
        super().__init__(config)
        self._recognizer = recognizer
        self._bundle = bundle
        self._reloads: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references to tasks

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_sighup)

    def _on_sighup(self) -> None:
        reload = asyncio.ensure_future(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._recognizer.swap(self._bundle)
        except UserError as error:
            log.error("SIGHUP: the bundle was not reloaded: %s", error)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._recognizer.begin_draining()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet, so that an address error is found before the bundle loads."""
    # Without the protocol's number, asyncio would not set TCP_NODELAY, and responses would wait for delayed ACKs.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from error
    return listener
