"""`wikiclip bench load`: latency against offered load, the knee, and what holds below and past it.

Starts a service of its own and lets Locust (`benchmarks/locustfile.py`) offer cold requests, open loop, in growing
steps until it no longer keeps up; then mixed traffic (cold, hot, batch, hostile) at a quarter of the knee, and a
spike from half the knee to four times it.
The load generator has one core and the service the others, where there is more than one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load_steps import knee, until_behind
from benchmarks.server import running_service, split_cores
from core.errors import UserError
from evaluation.pages import Series, line_plot, page, section, table

_COLUMNS = (
    "planned_per_s", "offered_per_s", "answered_per_s", "in_time_per_s", "p50_ms", "p90_ms", "p99_ms",
    "refused_share", "failed_share",
)  # fmt: skip
LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """The steps of the ramp, its knee, and the figures of mixed traffic and of a spike. `UserError` without Locust."""
    generator, service = split_cores()
    step_s = 3.0 if smoke else 10.0
    with (
        running_service(bundle_path, "--cache", "on", "--log-level", "warning", cores=service) as url,
        tempfile.TemporaryDirectory() as folder,
    ):
        work = Path(folder)
        run = _Locust(url, work, generator)
        run("Cold", shape="steady", rate=10, minutes=0.05)  # warms up
        ramp = until_behind(run("Cold", shape="ramp", rate=20, step_s=step_s, growth=1.7 if smoke else 1.35))
        top = knee(ramp)
        if top is None:
            raise UserError("the service kept up with no load at all; see docs/service.md on its settings")
        half = top["offered_per_s"] / 2
        mixed = run("Cold", "Hot", "Batch", "Hostile", shape="steady", rate=half / 2, minutes=0.1 if smoke else 0.5)
        spike = run("Cold", shape="spike", rate=half, step_s=step_s, spike=8)
    return {
        "image": "JPEG 1280x960",
        "cores": {"generator": sorted(generator), "service": sorted(service)},
        "knee": top,
        "ramp": ramp,
        "mixed": mixed,
        "spike": spike,
    }


def as_csv(figures: dict[str, Any]) -> str:
    """A line for each step of every part."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("part", *_COLUMNS))
    for part in ("ramp", "mixed", "spike"):
        writer.writerows((part, *(step[key] for key in _COLUMNS)) for step in figures[part])
    return out.getvalue()


def report(figures: dict[str, Any]) -> str:
    """An HTML page: latency against offered load with the knee marked, and a table of every step."""
    ramp = [step for step in figures["ramp"] if step["p50_ms"] is not None]
    series = [
        Series(name=name, points=[(step["offered_per_s"], step[key]) for step in ramp])
        for name, key in (("p50", "p50_ms"), ("p99", "p99_ms"))
    ]
    at = figures["knee"]
    series.append(
        Series(name="knee", points=[(at["offered_per_s"], at["p50_ms"]), (at["offered_per_s"], at["p99_ms"])])
    )
    plot = line_plot(
        series, title="Latency against offered load", x_label="requests/s offered", y_label="ms", y_log=True
    )
    said = f"<p>Knee: {at['offered_per_s']} requests/s, p50 {at['p50_ms']} ms, p99 {at['p99_ms']} ms.</p>"
    steps = [
        section(name, _table(figures[key])) for name, key in (("Ramp", "ramp"), ("Mixed", "mixed"), ("Spike", "spike"))
    ]
    return page("Load", "\n".join((section("Latency against offered load", said, plot), *steps)))


def _table(steps: Sequence[dict[str, Any]]) -> str:
    return table(_COLUMNS, [[str(step[key]) for key in _COLUMNS] for step in steps])


class _Locust:
    """Locust in a process of its own: it patches the interpreter that it runs in."""

    def __init__(self, url: str, work: Path, cores: set[int]) -> None:
        self._url, self._work, self._cores = url, work, cores

    def __call__(self, *kinds: str, **options: object) -> list[dict[str, Any]]:
        """Run to the end; the figures of each step. Raises `UserError` where Locust is missing or fails."""
        steps = self._work / "steps.json"
        steps.unlink(missing_ok=True)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [
            sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", self._url, "--headless", "--only-summary",
            "--loglevel", "ERROR", f"--steps={steps}", "--max-failed=1", *flags, *kinds,
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.sched_setaffinity(process.pid, self._cores)
        said, _ = process.communicate()
        if process.returncode or not steps.exists():
            if "No module named locust" in said:
                raise UserError("locust is not installed; `pip install 'wikiclip-serve[load]'` brings it")
            raise UserError(f"locust ended with exit code {process.returncode}: {said.strip()[-500:]}")
        figures: list[dict[str, Any]] = json.loads(steps.read_bytes())
        return figures
