"""Running the app under uvicorn."""

from __future__ import annotations

import logging
import socket

import uvicorn

from core.errors import UserError
from service.app import create_app
from service.logs import configure_logging
from service.recognizer import Recognizer
from service.settings import Settings

log = logging.getLogger("wikiclip.service")


def run_server(settings: Settings) -> None:
    """Serve until told to stop. Raises `UserError`: no bundle, one that cannot be served, or an address in use."""
    if settings.bundle is None:
        raise UserError("no bundle is given; name one with --bundle or WIKICLIP_BUNDLE")
    configure_logging(settings.log_level)
    with _bind(settings.host, settings.port) as listener:
        recognizer = Recognizer.open(settings.bundle, settings)
        host, port = listener.getsockname()[:2]
        log.info("serving %s on http://%s:%d", recognizer.label, f"[{host}]" if ":" in host else host, port)
        config = uvicorn.Config(
            create_app(settings, recognizer),
            log_config=None,
            ws="none",
            access_log=False,  # the app writes its own
            server_header=False,
            timeout_graceful_shutdown=settings.deadline_ms // 1000 + 1,
        )
        _Server(config, recognizer).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Tells the recogniser when stopping begins, so that it says it is not ready while it finishes."""

    def __init__(self, config: uvicorn.Config, recognizer: Recognizer) -> None:
        super().__init__(config)
        self._recognizer = recognizer

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
