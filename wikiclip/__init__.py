"""WikiCLIP Serve in Python: clients of a running service, or a bundle in this process.

    from wikiclip import Client, Recognizer

Importing this package loads nothing else. Clients and answers need httpx and pydantic only.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from index.bundle import Bundle
    from service.recognizer import Recognizer
    from wikiclip.answers import *
    from wikiclip.client import AsyncClient, Client
    from wikiclip.errors import *

_APPLICATION = {"Bundle": "index.bundle", "Recognizer": "service.recognizer"}
_LIGHT = ("wikiclip.errors", "wikiclip.answers", "wikiclip.client")

__all__ = [
    "AddedImage",
    "AsyncClient",
    "AttendedWord",
    "BadGateway",
    "BadRequest",
    "BatchRecognition",
    "Bundle",
    "BundleChange",
    "Client",
    "Conflict",
    "DeadlineExceeded",
    "EditedEntity",
    "EmbedOptions",
    "Embedding",
    "EmbeddingQuery",
    "Entities",
    "Entity",
    "EntityDetails",
    "EntityRequest",
    "Explanation",
    "Feedback",
    "Forbidden",
    "FoundEntity",
    "HeadTooLarge",
    "ImageCredit",
    "Info",
    "InternalError",
    "Level",
    "Liveness",
    "NotFound",
    "Prediction",
    "Problem",
    "Readiness",
    "Recognition",
    "RecognizeOptions",
    "Recognizer",
    "ServiceError",
    "SkippedImage",
    "SlowRequest",
    "TextQuery",
    "TooLarge",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "Unprocessable",
    "UnsupportedMediaType",
    "UserError",
    "WikiclipError",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _APPLICATION:
        from core.errors import needed_by

        with needed_by(f"wikiclip.{name}"):
            return getattr(importlib.import_module(_APPLICATION[name]), name)
    if name in __all__:
        for module in map(importlib.import_module, _LIGHT):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
