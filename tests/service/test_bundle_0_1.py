"""A bundle exported by version 0.1 keeps its fingerprint and its answers.

`tests/fixtures/bundle_0.1` holds the bundle, ten query images, and the answers that version 0.1 gave (commit 25c21df,
`wikiclip recognize --json` with the options listed in `answers.json`). Never regenerate it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from index.bundle import Bundle
from tests.commands import run_wikiclip

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "bundle_0.1"
RUNS = json.loads((FIXTURE / "answers.json").read_text(encoding="utf-8"))
# Another processor, or another batch, moves cosines in the seventh digit. Confidence has a slope of 313 here.
TOLERANCES = {"score": 2e-6, "confidence": 2e-4, "known": 2e-4, "weight": 1e-5}


def test_fingerprint_is_unchanged() -> None:
    bundle = Bundle.open(FIXTURE / "bundle")
    assert f"{bundle.name}@{bundle.fingerprint}" == "bundle_0.1@69326ce17348"


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join(run["options"]) or "default")
def test_answers_are_unchanged(run: dict[str, Any]) -> None:
    images = sorted((FIXTURE / "queries").glob("*.png"))
    done = run_wikiclip("recognize", *images, "--json", *run["options"], "--bundle", FIXTURE / "bundle")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        answer["image"] = Path(answer["image"]).name
        del answer["timings_ms"]
        assert answer.pop("level") is None
    assert without_numbers(answers) == without_numbers(run["answers"])
    expected = [pytest.approx(value, abs=tolerance) for value, tolerance in numbers(run["answers"])]
    assert [value for value, _ in numbers(answers)] == expected


def without_numbers(value: Any) -> Any:
    """Return the structure with every measured number replaced by its type."""
    if isinstance(value, dict):
        return {key: type(each) if key in TOLERANCES else without_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [float if isinstance(each, float) else without_numbers(each) for each in value]
    return value


def numbers(value: Any, tolerance: float = 1e-4) -> list[tuple[float, float]]:
    """Return the measured numbers in order, each with its tolerance. Heat maps have the default one."""
    if isinstance(value, dict):
        return [number for key, each in value.items() for number in numbers(each, TOLERANCES.get(key, tolerance))]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each, tolerance)]
    return [(value, tolerance)] if isinstance(value, float) else []
