"""The Locust file: its steps, and as a user runs it on a small bundle."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.generator import service_process
from benchmarks.load import LOCUSTFILE, REPORT, find_knee


@pytest.fixture(scope="module")
def locustfile() -> Iterator[ModuleType]:
    """The Locust file as a module, without the patches that Locust applies to the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCUST_SKIP_MONKEY_PATCH", "1")
        yield importlib.import_module("benchmarks.locustfile")


def options(**given: object) -> Namespace:
    return Namespace(**{"rate": 10.0, "step_s": 5.0, "minutes": 2.0, "growth": 2.0, **given})


def test_the_steps_of_each_shape(locustfile: ModuleType) -> None:
    def steps(shape: str, **given: object) -> list[tuple[float, float]]:
        return locustfile.SHAPES[shape](options(**given))

    assert steps("ramp")[:3] == [(10, 5), (20, 5), (40, 5)]
    assert steps("spike") == [(10, 5), (80, 5), (10, 5), (10, 5)]
    assert steps("steady") == [(10, 120)]
    assert steps("soak") == [(10, 60), (10, 60)]
    assert steps("soak", minutes=0.1) == [(10, 6)]


def test_figures_separate_answers_refusals_and_failures(locustfile: ModuleType) -> None:
    step = locustfile.Step(rate=10, length_s=10, started_s=100.0)
    for sent_s in (99.0, 101.0, 110.0):  # in another step, or while the load was settling
        step.add(sent_s, 5.0)
    for number in range(40):
        step.add(104.0, 10.0 + number)
    step.add(105.0, 5000.0)  # an answer, but too late
    step.add(106.0, 1.0, refused=True)
    step.add(106.0, 1.0, refused=True)
    step.add(106.0, 1.0, failed=True)
    figures = step.figures()
    assert figures["offered_per_s"] == round(44 / 7, 2)
    assert (figures["answered_per_s"], figures["in_time_per_s"]) == (round(41 / 7, 2), round(40 / 7, 2))
    assert (figures["refused_share"], figures["failed_share"]) == (round(2 / 44, 4), round(1 / 44, 4))
    assert figures["p50_ms"] == pytest.approx(30, abs=1)
    assert figures["p99_ms"] == 5000
    assert not figures["kept_up"]
    assert not locustfile.Step(rate=10, length_s=10).figures()["kept_up"]


def test_a_ramp_ends_past_the_knee(locustfile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = locustfile.Shape()
    parsed = options(shape="ramp")
    shape.runner = Namespace(user_count=0, environment=Namespace(parsed_options=parsed))
    seconds = 0.0
    monkeypatch.setattr(shape, "get_run_time", lambda: seconds)
    shape.reset_time()
    assert shape.tick() == (10, 10)
    shape.started[0].add(shape.started[0].started_s + 3, 10.0)
    seconds = 4.9
    assert shape.tick() == (10, 10)
    seconds = 6.0
    assert shape.tick() == (20, 20)
    shape.started[1].add(shape.started[1].started_s + 3, 5000.0)
    seconds = 11.0
    assert shape.tick() is None
    assert [step.rate for step in shape.started] == [10, 20]
    shape.reset_time()  # for the other tests
    assert shape.started == []


def test_a_steady_load_ends_after_its_time(locustfile: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = locustfile.Shape()
    shape.runner = Namespace(user_count=0, environment=Namespace(parsed_options=options(shape="steady")))
    shape.reset_time()
    for seconds, expected in ((0.0, (10, 10)), (119.0, (10, 10)), (120.0, None)):
        monkeypatch.setattr(shape, "get_run_time", lambda seconds=seconds: seconds)
        assert shape.tick() == expected
    shape.reset_time()


def test_the_knee_is_the_highest_load_at_which_the_service_kept_up() -> None:
    steps = [{"offered_per_s": rate, "kept_up": kept_up} for rate, kept_up in ((10, True), (20, True), (40, False))]
    assert find_knee(steps) == steps[1]
    assert find_knee(steps[2:]) is None


def test_the_report_shows_the_knee(locustfile: ModuleType) -> None:
    step = locustfile.Step(rate=10, length_s=10)
    step.add(5.0, 13.0)
    one = step.figures()
    figures = {"knee": one, "ramp": [one], "mixed": [one], "spike": [one]}
    (plot,) = REPORT.plots
    assert "knee, p50 ms" in plot.svg(figures)


@pytest.fixture(scope="module")
def url(small_bundle: Path) -> Iterator[str]:
    with service_process(small_bundle) as (_, url):
        yield url


def locust(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    return subprocess.run(
        [*command, "--shape=steady", *arguments],
        capture_output=True, text=True, timeout=120, check=False, cwd=LOCUSTFILE.parents[1],
    )  # fmt: skip


def test_every_kind_of_traffic_gets_the_expected_statuses(url: str, tmp_path: Path) -> None:
    # The rarest kinds arrive once a second on average. In 18 seconds they arrive almost certainly.
    done = locust(
        url, "--rate=16", "--minutes=0.3", f"--steps={tmp_path / 'steps.json'}", f"--csv={tmp_path / 'locust'}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads((tmp_path / "steps.json").read_bytes())
    assert figures["failed_share"] == 0
    rows = csv.DictReader((tmp_path / "locust_stats.csv").read_text().splitlines())
    assert {row["Name"] for row in rows} == {"cold", "hot", "batch", "hostile", "Aggregated"}


def test_the_file_needs_only_locust() -> None:
    """It imports Python's library, Locust and packages that Locust installs."""
    allowed = {"locust", "gevent", "geventhttpclient", "urllib3"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(LOCUSTFILE.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.partition(".")[0] in allowed


def test_a_run_above_a_limit_fails(url: str) -> None:
    done = locust(url, "--rate=10", "--minutes=0.08", "--max-p99-ms=0.001", "Cold")
    assert done.returncode == 1
    assert "threshold: p99_ms" in done.stdout
