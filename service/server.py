"""Running the app under uvicorn."""

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

from core.errors import UserError
from service.app import App, create_app, early_refusal, metrics_of
from service.protocol import BoundedHttp
from service.recognizer import Recognizer
from service.settings import Settings
from service.telemetry import configure_logging

_ALLOCATIONS = 20_000  # more than freed, before the collector looks at the youngest objects

log = logging.getLogger("wikiclip.service")


def run_server(settings: Settings) -> None:
    """Serve until told to stop. Raises `UserError`: no bundle, one that cannot be served, or an address in use."""
    if settings.bundle is None:
        raise UserError("no bundle is given; name one with --bundle or WIKICLIP_BUNDLE")
    configure_logging(settings.log_level)
    with _bind(settings.host, settings.port) as listener:
        _spare_collections()
        recognizer = Recognizer.open(settings.bundle, settings)
        host, port = listener.getsockname()[:2]
        log.info("serving %s on http://%s:%d", recognizer.label, f"[{host}]" if ":" in host else host, port)
        config = server_config(settings, create_app(settings, recognizer))
        _Server(config, recognizer, settings.bundle).run(sockets=[listener])


def _spare_collections() -> None:
    """Keep Python's collector from going through all that was imported again and again, and have it look less often.

    Not through what is opened after this: a bundle that was swapped away is to be freed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, 10, 10)


def server_config(settings: Settings, app: App) -> uvicorn.Config:
    """How uvicorn is to serve the app."""
    # On SIGTERM what was accepted is answered: it may have an image to fetch first, then a deadline to meet.
    finish_ms = settings.deadline_ms + (settings.url_timeout_ms if settings.url_allowlist else 0)
    return uvicorn.Config(
        app,
        http=cast(
            type[asyncio.Protocol],
            partial(
                BoundedHttp,
                timeout_s=settings.receive_timeout_s,
                refuse=partial(early_refusal, app),
                metrics_of=partial(metrics_of, app),
            ),
        ),
        log_config=None,
        ws="none",
        access_log=False,  # the app writes its own
        server_header=False,
        timeout_graceful_shutdown=finish_ms // 1000 + 1,
    )


class _Server(uvicorn.Server):
    """Tells the recogniser when stopping begins, so that it says it is not ready while it finishes, and on SIGHUP to
    load the configured bundle anew."""

    def __init__(self, config: uvicorn.Config, recognizer: Recognizer, bundle: Path | str) -> None:
        super().__init__(config)
        self._recognizer = recognizer
        self._bundle = bundle
        self._reloads: set[asyncio.Task[None]] = set()  # the loop itself keeps no hold of its tasks

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_hangup(self) -> None:
        reload = asyncio.ensure_future(self._reload())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        try:
            await self._recognizer.swap(self._bundle)
        except UserError as error:
            log.error("SIGHUP changes nothing: %s", error)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._recognizer.begin_draining()
        await super().shutdown(sockets)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a wrong address is told before the bundle is loaded, and a client is
    let in only after."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror}); choose another --host or --port"
        ) from error
    return listener
