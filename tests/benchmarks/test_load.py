"""Steps of offered load, and the Locust file as a user runs it, on a small bundle."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.load import LOCUSTFILE, as_csv, report
from benchmarks.load_steps import MOST_STEPS, Step, kept_up, knee, plan_of, until_behind
from benchmarks.server import running_service


def options(**given: object) -> Namespace:
    return Namespace(**{"rate": 10.0, "step_s": 5.0, "minutes": 2.0, "growth": 2.0, "spike": 8.0, **given})


def step(offered: float, in_time: float) -> dict[str, float]:
    return {"offered_per_s": offered, "in_time_per_s": in_time, "requests": 100}


def test_a_ramp_grows_and_a_spike_comes_back() -> None:
    ramp = plan_of(options(shape="ramp"))
    assert ramp.stops_past_knee
    assert [each.rate for each in ramp.steps[:3]] == [10, 20, 40]
    assert len(ramp.steps) == MOST_STEPS
    assert [each.rate for each in plan_of(options(shape="spike")).steps] == [10, 80, 10, 10]
    assert [each.length_s for each in plan_of(options(shape="steady")).steps] == [120]
    assert [each.length_s for each in plan_of(options(shape="soak")).steps] == [60, 60]


def test_the_step_of_a_moment() -> None:
    plan = plan_of(options(shape="spike"))
    assert plan.at(0) is plan.steps[0]
    assert plan.at(5) is plan.steps[1]
    assert plan.at(19.9) is plan.steps[3]
    assert plan.at(20) is None


def test_figures_tell_answers_refusals_and_failures_apart() -> None:
    tried = Step(rate=10, length_s=10)
    tried.note("cold", 1.0, 5.0, None)  # the load was still settling
    for position in range(40):
        tried.note("cold", 4.0, 10.0 + position, None)
    tried.note("cold", 5.0, 5000.0, None)  # an answer, but too late
    for reason in ("refused: 429", "refused: 429", "failed: 500"):
        tried.note("hot", 6.0, 1.0, reason)
    figures = tried.figures()
    assert figures["requests"] == 44
    assert (figures["answered_per_s"], figures["in_time_per_s"]) == (round(41 / 7, 2), round(40 / 7, 2))
    assert (figures["refused_share"], figures["failed_share"]) == (round(2 / 44, 4), round(1 / 44, 4))
    assert figures["p50_ms"] == 30
    assert figures["kinds"] == {"cold": 41, "hot": 3}
    assert not tried.kept_up()


def test_the_knee_is_the_last_step_that_kept_up() -> None:
    steps = [step(10, 10), step(20, 19.5), step(40, 30)]
    assert knee(steps) == steps[1]
    assert knee(steps[2:]) is None
    assert (
        until_behind([*steps, step(10, 0)]) == steps
    )  # what came after the service fell behind is no step of the ramp
    assert not kept_up({"offered_per_s": 0, "in_time_per_s": 0, "requests": 0})


def test_the_report_shows_every_step() -> None:
    step = Step(rate=10, length_s=10)
    step.note("cold", 5.0, 12.5, None)
    one = step.figures()
    figures = {"knee": one, "ramp": [one], "mixed": [one], "spike": [one]}
    lines = as_csv(figures).splitlines()
    assert [line.split(",")[0] for line in lines] == ["part", "ramp", "mixed", "spike"]
    assert "12.5" in lines[1].split(",")
    html = report(figures)
    assert html.count("<table>") == 3
    assert "12.5" in html
    assert "http" not in html.replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def url(small_bundle: Path) -> Iterator[str]:
    with running_service(small_bundle, "--log-level", "warning") as url:
        yield url


def locust(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    return subprocess.run(
        [*command, "--shape=steady", *arguments],
        capture_output=True, text=True, timeout=120, check=False, cwd=LOCUSTFILE.parents[1],
    )  # fmt: skip


def test_all_kinds_of_traffic_get_what_they_should(url: str, tmp_path: Path) -> None:
    steps = tmp_path / "steps.json"
    # The rarest kinds arrive once a second on average: in 12 seconds that count, all but certainly at least once.
    done = locust(url, "--rate=16", "--minutes=0.3", f"--steps={steps}")
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads(steps.read_bytes())
    assert figures["failed_share"] == 0
    assert set(figures["kinds"]) == {"cold", "hot", "batch", "hostile"}


def test_it_runs_where_only_locust_is_installed() -> None:
    """Its own imports: Python's library, Locust and what Locust brings, and the module beside it that is alike."""
    allowed = {"locust", "gevent", "geventhttpclient", "benchmarks"} | set(sys.stdlib_module_names)
    for path in (LOCUSTFILE, LOCUSTFILE.with_name("load_steps.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.partition(".")[0] in allowed
                assert not node.module.startswith("benchmarks") or node.module == "benchmarks.load_steps"


def test_a_bound_that_is_passed_fails_the_run(url: str) -> None:
    done = locust(url, "--rate=10", "--minutes=0.08", "--max-p99-ms=0.001", "Cold")
    assert done.returncode == 1
    assert "threshold: p99 (ms)" in done.stdout
