"""The migration from 0.1 on docs/upgrading.md, with the bundle and the checkpoint that version 0.1 wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from index.bundle import Bundle

PageRun = Any  # the dataclass in conftest.py, which no module can import

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "bundle_0.1"
NAME = "bundle_0.1@69326ce17348"


@pytest.fixture(scope="module")
def upgrading(run_page: Callable[..., PageRun]) -> PageRun:
    return run_page("upgrading")


def test_the_old_bundle_is_served_as_before(upgrading: PageRun) -> None:
    assert NAME in upgrading.after("wikiclip inspect")
    answer = json.loads(upgrading.after("curl -s --fail -F"))
    (default,) = [run for run in json.loads((FIXTURE / "answers.json").read_text()) if run["options"] == []]
    expected = default["answers"][0]["predictions"][0]
    assert answer["bundle"] == NAME
    assert answer["predictions"][0]["entity_id"] == expected["entity_id"]
    assert answer["predictions"][0]["confidence"] == pytest.approx(expected["confidence"], abs=2e-4)
    assert answer["level"] is None


def test_the_service_swaps_to_the_bundle_of_the_old_checkpoint(upgrading: PageRun) -> None:
    swapped = json.loads(upgrading.after("curl -s --fail -H"))
    bundle = Bundle.open(upgrading.folder / "bundle-0.2")
    assert swapped["previous"] == NAME
    assert swapped["bundle"] == f"{bundle.name}@{bundle.fingerprint}"
