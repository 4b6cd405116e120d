"""The plan of Symbols from the npm packages, without rendering drawings."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from demo.build import BUILD, Drawing, plan_drawings, split_entities
from demo.entities import Symbol, build_symbols
from demo.sources import fetch

T = TypeVar("T")


def shared(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], T]) -> T:
    """Return what one of the test processes has made. It takes 20 seconds."""
    folder = tmp_path_factory.getbasetemp()
    file = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"{name}.pickle"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_bytes(pickle.dumps(make()))
    made: T = pickle.loads(file.read_bytes())
    return made


@pytest.fixture(scope="session")
def sources() -> Path:
    folder = BUILD / "sources"
    fetch(folder)
    return folder


@pytest.fixture(scope="session")
def symbols(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> list[Symbol]:
    return shared(tmp_path_factory, "symbols", lambda: build_symbols(sources))


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory, symbols: list[Symbol]) -> list[Drawing]:
    return shared(tmp_path_factory, "drawings", lambda: plan_drawings(symbols, split_entities(symbols)))
