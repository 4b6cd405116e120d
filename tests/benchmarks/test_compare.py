"""`wikiclip bench compare`: noise is no change, and a slowdown is found for metrics of both directions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.compare import as_text, compare, metrics_of, read_run, regressions
from benchmarks.measure import Metric, Probe, nested, ratio_interval, sample, write_outcome
from core.errors import UserError
from evaluation import pages

METRICS = 30


def synthetic_run(
    seed: int, *, slower: float = 1.0, machine: float = 1.0, rounds: int = 12, speed_seen: bool = True
) -> dict[str, Any]:
    """Return a synthetic run on a shared machine. Samples get worse in bursts, which the reference sees or not. One
    metric of each direction is `slower`."""
    rng = np.random.default_rng(seed)
    metrics = {}
    for number in range(METRICS):
        burst = 1 + rng.exponential(0.3, rounds) * (rng.random(rounds) < 0.4)
        times = 5.0 * (number + 1) * burst * machine * rng.lognormal(0, 0.03, rounds)
        reference = 10.0 * machine * rng.lognormal(0, 0.03, rounds) * (burst if speed_seen else 1)
        times = times * (slower if number in (3, 4) else 1)
        metrics[f"group/{number}"] = (
            Metric(samples=times.tolist(), reference_ms=reference.tolist())
            if number != 4
            else Metric(
                unit="images/s", better="higher", samples=(1000 / times).tolist(), reference_ms=reference.tolist()
            )
        )
    return {"figures": {"made": nested(metrics)}}


@pytest.mark.parametrize("seed", range(6))
def test_two_runs_of_one_thing_are_no_regression(seed: int) -> None:
    comparison = compare(synthetic_run(seed), synthetic_run(100 + seed, speed_seen=seed % 2 == 0))
    assert regressions(comparison) == []
    assert len(comparison) == METRICS
    assert "no regression past 20 %" in as_text(comparison)


def test_a_slower_machine_is_no_regression() -> None:
    assert regressions(compare(synthetic_run(1), synthetic_run(2, machine=1.8))) == []


@pytest.mark.parametrize("seed", range(6))
def test_a_slowed_version_is_caught_and_nothing_else(seed: int) -> None:
    comparison = compare(synthetic_run(seed), synthetic_run(50 + seed, slower=1.7))
    assert set(regressions(comparison)) == {"made/group/3", "made/group/4"}
    for change in (each for each in comparison if each.verdict == "regression"):
        assert change.interval[0] > 1.2
        assert change.worse == pytest.approx(1.7, rel=0.15)
    back = compare(synthetic_run(50 + seed, slower=1.7), synthetic_run(seed))
    assert {c.name for c in back if c.verdict == "improvement"} == {"made/group/3", "made/group/4"}
    assert regressions(back) == []


def test_a_threshold_that_is_not_passed_is_no_regression() -> None:
    comparison = compare(synthetic_run(1), synthetic_run(2, slower=1.7), threshold=1.0)
    assert regressions(comparison) == []
    assert "no regression past 100 %" in as_text(comparison, 1.0)


def test_few_samples_are_undecided() -> None:
    comparison = compare(synthetic_run(1, rounds=4), synthetic_run(2, rounds=4, slower=5))
    assert {change.verdict for change in comparison} == {"fewer than 5 samples: undecided"}


def test_a_call_slowed_on_purpose_is_caught_for_real() -> None:
    """Real times on this machine: in the second run, one of three pieces of work is repeated five times."""

    def work(times: int) -> Any:
        return lambda _: [sum(range(4000)) for _ in range(times)]

    def run(slowed: int) -> dict[str, Any]:
        probes = [Probe(name=name, call=work(20 * (slowed if name == "b" else 1))) for name in "abc"]
        return {"figures": nested(sample(probes, rounds=12, moment_s=0.005))}

    before, after = run(1), run(5)
    # Other work on the machine may slow the others too.
    assert "b" in regressions(compare(before, after, threshold=0.5))


def test_a_run_past_its_time_ends_after_two_rounds() -> None:
    metrics = sample([Probe(name="x", call=lambda i: i)], rounds=50, moment_s=0, until=time.monotonic() - 1)
    assert len(metrics["x"].samples) == 2


def test_the_command_exits_1_on_a_regression(tmp_path: Path) -> None:
    for name, run in (("a", synthetic_run(1)), ("same", synthetic_run(2)), ("slow", synthetic_run(3, slower=2))):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "all.json").write_text(json.dumps(synthetic_run(4)))

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "wikiclip", "bench", "compare", *map(str, arguments)]
        return subprocess.run(call, capture_output=True, text=True, check=False, timeout=120)

    done = command(tmp_path / "a.json", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    done = command(tmp_path / "a.json", tmp_path / "slow.json", "--json")
    assert done.returncode == 1
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["regressions"] == ["made/group/3", "made/group/4"]
    done = command(tmp_path / "a.json", tmp_path / "nowhere.json")
    assert done.returncode == 2
    assert "nowhere.json cannot be read" in done.stderr


def test_missing_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no results"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no metric with samples in common"):
        compare({"figures": {}}, synthetic_run(1))
    found = dict(metrics_of({"a": {"b": {"samples": [1.0], "better": "lower"}, "c": 3}, "d": [1]}))
    assert list(found) == ["a/b"]


def test_the_interval_of_a_ratio_contains_the_ratio() -> None:
    rng = np.random.default_rng(0)
    slow, fast = rng.lognormal(2, 0.1, 40), rng.lognormal(0, 0.1, 40)
    low, high = ratio_interval(slow.tolist(), fast.tolist())
    assert low < np.median(slow) / np.median(fast) < high
    assert ratio_interval([6.0, 6.0], [2.0, 2.0]) == [3.0, 3.0]


def test_without_its_libraries_a_report_is_skipped_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = {"hardware": {"name": "box"}, "date": "today", "commit": "abc", "figures": {"x": 1}}
    parts = {"index": (pages.Report(title="Index"), {"x": 1})}
    write_outcome(tmp_path, "index", outcome, "Title", parts)
    assert "<h1>Title</h1>" in (tmp_path / "box-today-abc" / "index.html").read_text()
    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    write_outcome(tmp_path, "other", outcome, "Title", parts)
    assert not (tmp_path / "box-today-abc" / "other.html").exists()
    assert json.loads((tmp_path / "box-today-abc" / "other.json").read_bytes()) == outcome
    assert capsys.readouterr().err.splitlines()[-1] == (
        "no HTML report: a report needs jinja2: pip install 'wikiclip-serve[report]'"
    )
