"""`wikiclip bench all` runs what fits in the time, adds earlier results, and writes one report."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cli import BENCHMARKS, Benchmark
from benchmarks.measure import results_folder
from benchmarks.suite import run_all
from core.runtime import describe_run

MINUTES = 5.0  # far more than needed, also on a busy machine


def some(*names: str) -> dict[str, Benchmark]:
    return {name: BENCHMARKS[name] for name in names}


def test_new_and_earlier_results_make_one_report(small_bundle: Path, tmp_path: Path) -> None:
    folder = results_folder(tmp_path, describe_run({}))
    folder.mkdir()
    kept = {"settings": {"bundle": small_bundle.name, "smoke": True}, "figures": {"p50_ms": 12.5}}
    (folder / "load.json").write_text(json.dumps({**kept, "figures": {"x": 1}, "settings": {"bundle": "another"}}))
    (folder / "train.json").write_text(json.dumps(kept))
    # A smoke run leaves out `load`, `index` and `train` with any budget.
    benchmarks = some("stages", "index", "load", "train")
    outcome = run_all(benchmarks, small_bundle, tmp_path, smoke=True, minutes=MINUTES)
    path = folder / "all.json"
    assert json.loads(path.read_bytes()) == outcome
    assert set(outcome["figures"]) == {"stages", "train"}
    assert outcome["figures"]["train"] == {"p50_ms": 12.5}
    left_out = outcome["settings"]["left_out"]
    assert left_out["load"] == left_out["index"] == "not run within the time given"
    assert left_out["train"].endswith("figures are of an earlier run of this commit")
    growth = outcome["figures"]["stages"]["growth"]
    assert {len(metric["samples"]) for kind in growth.values() for metric in kind.values()} == {2}
    assert all(each["fast_recall_at_10"] > 0.95 for each in outcome["figures"]["stages"]["catalogs"])
    html = path.with_suffix(".html").read_text()
    assert re.findall(r"(?:src|href)=[\"'](?!data:|#)", html) == []
    assert all(f'id="{name}"' in html for name in outcome["figures"])
    assert html.count("<svg") == 2
    assert "12.5" in html
    # A second run keeps the first, for comparison.
    again = run_all({}, small_bundle, tmp_path, smoke=True, minutes=MINUTES)
    assert again["figures"] == {}
    assert json.loads((folder / "all.before.json").read_bytes()) == outcome


def test_a_failing_benchmark_is_named_with_its_reason(tmp_path: Path) -> None:
    outcome = run_all(some("service"), tmp_path / "nowhere", tmp_path, smoke=True, minutes=MINUTES)
    assert outcome["figures"] == {}
    assert "nowhere" in outcome["settings"]["left_out"]["service"]


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["in the foreground", "in the background"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set the SIGINT handler that a shell gives to foreground and background processes."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_benchmark_past_its_time_is_interrupted(small_bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.suite._SMOKE_OVERTIME_S", -1e9)
    outcome = run_all(some("service"), small_bundle, tmp_path, smoke=True, minutes=MINUTES)
    assert outcome["figures"] == {}
    assert "stopped after" in outcome["settings"]["left_out"]["service"]
