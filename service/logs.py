"""Logs as JSON, one object a line, on stderr. What is logged of a request never includes its image."""

from __future__ import annotations

import logging
import warnings
from datetime import UTC, datetime

import orjson

_EXTRAS = ("request_id", "method", "path", "status", "elapsed_ms", "client")


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _EXTRAS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def configure_logging(level: str) -> None:
    """Send this process's logs to stderr, ours from `level` on, those of libraries from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("wikiclip").setLevel(level.upper())
    # What Pillow finds odd in somebody's file is nothing to tell the operator of.
    warnings.filterwarnings("ignore", module="PIL")
