"""`wikiclip bench all` runs what fits in the time, and writes one report."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks.cli import BENCHMARKS, Benchmark
from benchmarks.generator import wait_for
from benchmarks.measure import results_folder
from benchmarks.suite import run_all
from core.runtime import describe_run

MINUTES = 5.0  # far more than needed, also on a busy machine


def some(*names: str) -> dict[str, Benchmark]:
    return {name: BENCHMARKS[name] for name in names}


def test_new_results_make_one_report(small_bundle: Path, tmp_path: Path) -> None:
    # A smoke run leaves out `load` and `index` with any budget.
    outcome = run_all(some("stages", "index", "load"), small_bundle, tmp_path, smoke=True, minutes=MINUTES)
    folder = results_folder(tmp_path, describe_run({}))
    path = folder / "all.json"
    assert json.loads(path.read_bytes()) == outcome
    assert set(outcome["figures"]) == {"stages"}
    assert outcome["settings"]["left_out"] == dict.fromkeys(("index", "load"), "not run within the time given")
    search = outcome["figures"]["stages"]["search"]
    assert {len(metric["samples"]) for metric in search.values()} == {2}
    html = path.with_suffix(".html").read_text()
    assert re.findall(r"(?:src|href)=[\"'](?!data:|#)", html) == []
    assert 'id="stages"' in html
    assert html.count("<svg") == 1
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_all_benchmarks_stops_their_processes(
    small_bundle: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "wikiclip", "bench", "all", "--smoke", "--bundle", str(small_bundle)]
    with subprocess.Popen([*command, "--results", str(tmp_path)], stderr=subprocess.DEVNULL) as process:
        main = psutil.Process(process.pid)

        def has_service() -> bool:
            with suppress(psutil.NoSuchProcess):  # one that has just ended
                return any("serve" in each.cmdline() for each in main.children(recursive=True))
            return False

        wait_for(has_service, "no benchmark started a service")
        started = main.children(recursive=True)
        assert len(started) >= 2
        process.send_signal(number)
        assert process.wait(120) == code
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
