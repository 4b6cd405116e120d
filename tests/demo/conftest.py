"""The plan of Symbols from the npm packages, without rendering drawings."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.build import BUILD, Drawing, plan_drawings, split_entities
from demo.entities import Symbol, build_symbols
from demo.sources import fetch


@pytest.fixture(scope="session")
def sources() -> Path:
    folder = BUILD / "sources"
    fetch(folder)
    return folder


@pytest.fixture(scope="session")
def symbols(sources: Path) -> list[Symbol]:
    return build_symbols(sources)


@pytest.fixture(scope="session")
def drawings(symbols: list[Symbol]) -> list[Drawing]:
    return plan_drawings(symbols, split_entities(symbols))
