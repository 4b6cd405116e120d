"""`wikiclip bench all`, or `make bench`: each benchmark in its own process within a time budget, one JSON and one page.

The most important ones come first and get a share of the budget. The others run if their time allows. A benchmark that
did not run is taken from an earlier run of the same hardware, date and commit, if there is one. One that fails or is
stopped is named in the report with its reason; the others run as usual.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import results_folder, write_report, write_results
from core.runtime import describe_run
from evaluation.pages import Report, body_of, figures_page, page, section, table

MINUTES, SMOKE_MINUTES = 14.0, 0.75
_GRACE_S = 20  # for an interrupted benchmark to stop its processes
_SMOKE_OVERTIME_S = 120  # the budget of a smoke run is for an idle machine
_REPORT_S = 20  # of the budget
_EARLIER = "figures are of an earlier run of this commit"

Benchmarks = Mapping[str, tuple[str, str]]  # name to module and help text


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark of the suite and its duration on two cores. Without `smoke_s`, a smoke run leaves it out.

    `budgeted`: it takes `--minutes`. `short`: only its smoke run fits; a whole run of the same commit is shown instead
    if there is one.
    """

    name: str
    takes_s: float = 90.0
    smoke_s: float | None = None
    budgeted: bool = False
    short: bool = False
    smoke_options: Sequence[str] = ()


PARTS = (
    Part(name="stages", takes_s=240, smoke_s=12, budgeted=True),
    Part(name="claim", takes_s=330, smoke_s=16, budgeted=True, smoke_options=("--size", "tiny")),
    Part(name="load", takes_s=130),
    Part(name="peers", takes_s=100, short=True),
    Part(name="service", takes_s=170, smoke_s=14),
    Part(name="index", takes_s=90),
    Part(name="export", takes_s=60),
    Part(name="overload", takes_s=240),
    Part(name="faults", takes_s=420),
)


def run_all(
    benchmarks: Benchmarks, bundle: Path, results: Path, *, smoke: bool, minutes: float | None
) -> tuple[Path, dict[str, Any]]:
    """Run what fits and add what is there. Return the path of `all.json` and its content. Write `all.html` too."""
    minutes = minutes or (SMOKE_MINUTES if smoke else MINUTES)
    began = time.monotonic()
    ends = began + 60 * minutes - (0 if smoke else _REPORT_S)
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "minutes": minutes})
    folder = results_folder(results, run)
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    took_s: dict[str, float] = {}
    known = {part.name for part in PARTS}
    for part in (*PARTS, *(Part(name=name) for name in benchmarks if name not in known)):
        if part.name not in benchmarks:
            continue
        if part.short and not smoke and (earlier := _earlier(folder, part.name, bundle, smoke=False)) is not None:
            figures[part.name] = earlier
            left_out[part.name] = _EARLIER
            continue
        needed = part.smoke_s if smoke else part.takes_s
        left = ends - time.monotonic()
        if needed is None or (left < needed and not (part.budgeted and left > needed / 2)):
            left_out[part.name] = "not run within the time given"
            continue
        click.echo(f"{part.name}: {left:.0f} s left", err=True)
        started = time.monotonic()
        options = [*(part.smoke_options if smoke else ()), *(("--smoke",) if smoke or part.short else ())]
        options += ["--minutes", f"{min(needed, left) / 60:.2f}"] if part.budgeted else []
        command = ["bench", part.name, "--json", "--bundle", str(bundle), "--results", str(results), *options]
        outcome = _run(command, timeout_s=left + (_SMOKE_OVERTIME_S if smoke else 0))
        took_s[part.name] = round(time.monotonic() - started, 1)
        if isinstance(outcome, str):
            left_out[part.name] = outcome
        else:
            figures[part.name] = outcome
    for name in set(left_out) - set(figures):
        if (earlier := _earlier(folder, name, bundle, smoke=smoke)) is not None:
            figures[name] = earlier
            left_out[name] += f"; {_EARLIER}"
    run["settings"] |= {"took_s": took_s, "left_out": left_out}
    run["minutes"] = round((time.monotonic() - began) / 60, 1)
    outcome = {**run, "figures": figures}
    path = write_results(results, "all", outcome)
    write_report(path, lambda: report(benchmarks, outcome))
    return path, outcome


def _earlier(folder: Path, name: str, bundle: Path, *, smoke: bool) -> Any:
    """Return the figures of an earlier run with the same bundle and size, None if there is none."""
    try:
        run = json.loads((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None
    same = run["settings"].get("bundle") == bundle.name and run["settings"].get("smoke") is smoke
    return run["figures"] if same else None


def _run(arguments: Sequence[str], *, timeout_s: float) -> dict[str, Any] | str:
    """Run a command in its own session. Return its figures, or the reason why there are none."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wikiclip", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_accept_interrupts,  # noqa: PLW1509 - the suite has no threads
    )
    try:
        output, errors = process.communicate(timeout=max(timeout_s, 0.1))
    except subprocess.TimeoutExpired:
        output, errors = _interrupt(process)
        if process.returncode:  # otherwise it had just finished
            return f"stopped after {timeout_s:.0f} s, the time that was left"
    except BaseException:
        _interrupt(process)
        raise
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return lines[-1].removeprefix("error: ")
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])["figures"]
    return figures


def _accept_interrupts() -> None:
    """Undo that a shell lets background processes ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a process and its children, as by Ctrl-C, then by SIGKILL. Return its output and errors."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_GRACE_S)
    raise RuntimeError(f"process {process.pid} does not end, though it was killed")


def report(benchmarks: Benchmarks, outcome: dict[str, Any]) -> str:
    """Return one page: the hardware, then each benchmark's own report or a table of its figures."""
    hardware = outcome["hardware"]
    rows = [[key, str(value)] for key, value in hardware.items() if key != "name"]
    rows += [[key, str(outcome[key])] for key in ("commit", "date", "minutes")]
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in outcome["figures"])
    parts = [f"<p>{links}</p>", section("Hardware and commit", table(["", ""], rows))]
    for name, figures in outcome["figures"].items():
        module = importlib.import_module(benchmarks[name][0])
        if hasattr(module, "report"):
            body = body_of(module.report(figures))
        else:
            shown = getattr(module, "REPORT", Report(title=name.capitalize()))
            body = body_of(figures_page("", {name: (shown, figures)}))
        parts.append(f'<article id="{name}"><h1>{name.capitalize()}</h1>\n{body}</article>')
    if left_out := outcome["settings"]["left_out"]:
        parts.append(section("Left out", table(["benchmark", "reason"], [list(row) for row in left_out.items()])))
    return page(f"Benchmarks on {hardware['name']}", "\n".join(parts))
