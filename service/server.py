"""Run the app under uvicorn."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from core.errors import UserError, WikiclipError
from core.runtime import returnable_memory
from service.app import create_app
from service.protocol import GuardedHttpProtocol
from service.recognizer import Recognizer
from service.settings import Settings
from service.telemetry import configure_logging

KEEP_ALIVE_S = 75  # load balancers close idle connections after 60; a request on one that closes at that moment is lost
_CLOSE_S = 8  # after the last request; an unreachable trace collector takes 5
_GC_THRESHOLD = 20_000  # allocations minus deallocations that start a collection

log = logging.getLogger("wikiclip.service")


def run_server(settings: Settings) -> None:
    """Serve until a signal stops the process. Raises `UserError` for a missing or bad bundle or a used address."""
    if settings.bundle is None:
        raise UserError("there is no bundle to serve; name one with --bundle or WIKICLIP_BUNDLE")
    configure_logging(settings.log_level)
    early_sighups: list[int] = []
    signal.signal(signal.SIGHUP, lambda number, _: early_sighups.append(number))
    if os.getpid() == 1:  # the kernel would ignore what ends any other process, also while the bundle loads
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    with bind(settings.host, settings.port) as listener:
        # Imported modules are excluded from garbage collection, but not the bundle, which may be swapped out later.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD, 10, 10)
        with returnable_memory():
            recognizer = Recognizer.open(settings.bundle, settings)
        log.info("serving %s on %s", recognizer.label, url_of(*listener.getsockname()[:2]))
        config = server_config(settings, create_app(settings, recognizer))
        _Server(config, recognizer, settings.bundle, early_sighups).run(sockets=[listener])


def url_of(host: str, port: int) -> str:
    """Return the URL of a service on this address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


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
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=shutdown_ms // 1000 + 1,
    )


class _Server(uvicorn.Server):
    """Makes the service unready when shutdown begins, ends the process if shutdown takes too long, and reloads the
    configured bundle on SIGHUP. `early_sighups` are those of the start, which may have read the bundle before them.
    """

    def __init__(
        self, config: uvicorn.Config, recognizer: Recognizer, bundle: Path | str, early_sighups: list[int]
    ) -> None:
        super().__init__(config)
        self._recognizer = recognizer
        self._bundle = bundle
        self._early_sighups = early_sighups
        self._reloads: set[asyncio.Task[None]] = set()  # the event loop keeps only weak references to tasks

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_sighup)
        if self._early_sighups:
            log.info("SIGHUP during start: the bundle is reloaded")
            self._on_sighup()

    def _on_sighup(self) -> None:
        reload = asyncio.ensure_future(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._recognizer.swap(self._bundle)
        except WikiclipError as error:
            log.error("SIGHUP: the bundle was not reloaded: %s", error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            limit_s = (self.config.timeout_graceful_shutdown or 0) + _CLOSE_S
            watchdog = threading.Timer(limit_s, _exit_now, [limit_s])
            watchdog.daemon = True
            watchdog.start()
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._recognizer.begin_draining()
        await super().shutdown(sockets)


def _exit_now(limit_s: float) -> None:
    names = ", ".join(sorted(thread.name for thread in threading.enumerate()))
    message = "the shutdown did not end within %g s: the process exits at once. Its threads: %s"
    logging_thread = threading.Thread(target=log.error, args=[message, limit_s, names], daemon=True)
    logging_thread.start()
    logging_thread.join(1)  # the reader of the log may hang as well
    os._exit(1)


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
