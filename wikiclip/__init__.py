"""WikiCLIP Serve in Python: clients of a running service, or a bundle in this process.

    from wikiclip import Client, Recognizer

The public names are `Client`, `AsyncClient`, `Recognizer`, `Bundle`, and all classes of `wikiclip.answers` and
`wikiclip.errors`. Importing this package loads nothing else. Clients and answers need httpx and pydantic only.
"""

# ruff: noqa: F403
from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from index.bundle import Bundle as Bundle
    from service.recognizer import Recognizer as Recognizer
    from wikiclip.answers import *
    from wikiclip.client import AsyncClient as AsyncClient
    from wikiclip.client import Client as Client
    from wikiclip.errors import *

_APPLICATION = {"Bundle": "index.bundle", "Recognizer": "service.recognizer"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _APPLICATION:
        from core.errors import needed_by

        with needed_by(f"wikiclip.{name}"):
            return getattr(importlib.import_module(_APPLICATION[name]), name)
    if name == "__all__":
        return __dir__()
    # Other names, such as those of modules, must not load pydantic.
    if name[:1].isupper() and name in (classes := _light_classes()):
        return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_APPLICATION, *_light_classes()])


@cache
def _light_classes() -> dict[str, type]:
    """Return the public classes that need neither index nor service, by name."""
    modules = map(importlib.import_module, ("wikiclip.errors", "wikiclip.answers", "wikiclip.client"))
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
    }
