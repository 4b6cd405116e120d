"""`wikiclip bench load`: latency against offered load, the knee, and mixed traffic and a spike around it.

Locust (`locustfile.py`) offers cold requests, open loop, in growing steps until the service falls behind. The knee is
the last step in which it kept up. Then come mixed traffic (cold, hot, batch, hostile) at a quarter of the knee, and a
spike from half the knee to four times the knee. Locust has one core and the service the others, where there are two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.generator import service_process, split_cores
from core.errors import UserError, missing_extra
from evaluation.pages import Lines, Report

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
REPORT = Report(
    title="Load",
    plots=(
        Lines(
            title="Latency against offered load", x_label="requests/s offered", y_label="ms", y_log=True,
            points=("ramp/*", "knee"), x="offered_per_s", y=("p50_ms", "p99_ms"),
        ),
    ),
)  # fmt: skip


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return the steps of the ramp, its knee, and the steps of mixed traffic and of the spike."""
    generator, service = split_cores()
    step_s = 3.0 if smoke else 10.0
    with service_process(bundle_path, "--cache", "on", cores=service) as (_, url):
        run_locust(url, generator, "Cold", shape="steady", rate=10, minutes=0.05)  # warms up
        growth = 1.7 if smoke else 1.35
        ramp = run_locust(url, generator, "Cold", shape="ramp", rate=20, step_s=step_s, growth=growth)
        knee = find_knee(ramp)
        if knee is None:
            raise UserError("the service did not keep up with the lowest load; docs/settings.md describes its settings")
        half = knee["offered_per_s"] / 2
        kinds = ("Cold", "Hot", "Batch", "Hostile")
        mixed = run_locust(url, generator, *kinds, shape="steady", rate=half / 2, minutes=0.1 if smoke else 0.5)
        spike = run_locust(url, generator, "Cold", shape="spike", rate=half, step_s=step_s)
    return {
        "image": "JPEG 1280x960",
        "cores": {"generator": sorted(generator), "service": sorted(service)},
        "knee": knee,
        "ramp": ramp,
        "mixed": mixed,
        "spike": spike,
    }


def run_locust(url: str, cores: set[int], *kinds: str, **options: object) -> list[dict[str, Any]]:
    """Run Locust to the end and return the figures of each step. Raise `MissingExtra`, or `UserError` if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        steps = Path(folder) / "steps.json"
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [
            sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary",
            "--loglevel", "ERROR", f"--steps={steps}", "--max-failed=1", *flags, *kinds,
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        os.sched_setaffinity(process.pid, cores)
        output, _ = process.communicate()
        if "No module named locust" in output:
            raise missing_extra("this benchmark", "locust")
        if process.returncode or not steps.exists():
            raise UserError(f"locust ended with exit code {process.returncode}: {output.strip()[-500:]}")
        figures: list[dict[str, Any]] = json.loads(steps.read_bytes())
    return figures


def find_knee(ramp: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the step with the highest load at which the service kept up, or None."""
    return max((step for step in ramp if step["kept_up"]), key=lambda step: float(step["offered_per_s"]), default=None)
