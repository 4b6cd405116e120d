"""`wikiclip bench all`, or `make bench`: each benchmark in its own process within a time budget, one JSON and one page.

The most important ones come first. Each runs if the time allows. One that does not run, fails or is stopped is named
in the report with its reason; the others run as usual.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from benchmarks.cli import Benchmark
from benchmarks.measure import MACHINE, write_outcome
from core.errors import UserError
from core.runtime import describe_run
from evaluation.pages import Report

MINUTES, SMOKE_MINUTES = 14.0, 0.75
_GRACE_S = 20  # for an interrupted benchmark to stop its processes
_SMOKE_OVERTIME_S = 120  # the budget of a smoke run is for an idle machine
_REPORT_S = 20  # of the budget


def run_all(
    benchmarks: Mapping[str, Benchmark], bundle: Path, results: Path, *, smoke: bool, minutes: float | None
) -> dict[str, Any]:
    """Run what fits and add what is there. Write `all.json` and `all.html` and return the content of the former."""
    minutes = minutes or (SMOKE_MINUTES if smoke else MINUTES)
    began = time.monotonic()
    ends = began + 60 * minutes - (0 if smoke else _REPORT_S)
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "minutes": minutes})
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    took_s: dict[str, float] = {}
    for name, benchmark in benchmarks.items():
        has_minutes = any(option.name == "minutes" for option in benchmark.options)
        needed, left = benchmark.smoke_s if smoke else benchmark.takes_s, ends - time.monotonic()
        if needed is None or left < (needed / 2 if has_minutes else needed):
            left_out[name] = "not run within the time given"
            continue
        click.echo(f"{name}: {left:.0f} s left", err=True)
        started = time.monotonic()
        command = ["bench", name, "--json", "--bundle", str(bundle), "--results", str(results)]
        command += benchmark.smoke_arguments if smoke else benchmark.arguments
        command += ["--minutes", f"{min(needed, left) / 60:.2f}"] if has_minutes else []
        try:
            figures[name] = _run(command, timeout_s=left + (_SMOKE_OVERTIME_S if smoke else 0))
        except UserError as error:
            left_out[name] = error.detail
        took_s[name] = round(time.monotonic() - started, 1)
    run["settings"] |= {"took_s": took_s, "left_out": left_out}
    run["minutes"] = round((time.monotonic() - began) / 60, 1)
    parts = {"machine": (MACHINE, run)}
    for name, each in figures.items():
        module = importlib.import_module(benchmarks[name].module)
        parts[name] = getattr(module, "REPORT", Report(title=name.capitalize())), each
    whole = {**run, "figures": figures}
    write_outcome(results, "all", whole, f"Benchmarks on {run['hardware']['name']}", parts)
    return whole


def _run(arguments: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """Run a command in its own session and return its figures. Raise `UserError` with the reason if there are none."""
    # A shell lets background processes ignore SIGINT. A process started from one with a handler does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "wikiclip", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=max(timeout_s, 0.1))
    except subprocess.TimeoutExpired:
        raise UserError(f"stopped after {timeout_s:.0f} s, the time that was left") from None
    finally:
        try:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=_GRACE_S)
        finally:  # also after a second Ctrl-C
            with suppress(ProcessLookupError):  # all of its processes have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        raise UserError(lines[-1].removeprefix("error: "))
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])["figures"]
    return figures
