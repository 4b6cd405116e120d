"""`wikiclip bench all`, or `make bench`: benchmarks in a process each, within a time budget, as one JSON and one page.

What matters most comes first and gets a share of the budget; the rest runs where its time allows. A benchmark that did
not run is taken from an earlier run of the same hardware, date and commit where there is one. None can spoil another:
one that fails, or is stopped at its bound, is named in the report with its reason.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import results_folder, write_results
from core.files import atomic_write_bytes
from core.runtime import describe_run
from evaluation.pages import body_of, figures_table, page, section, table

MINUTES, SMOKE_MINUTES = 14.0, 0.75
_GRACE_S = 20  # for a benchmark that is told to end to stop what it started
_EARLIER = "figures are of an earlier run of this commit"
_OVERTIME_S = 120  # of a smoke run, whose budget is one of an idle machine
_SPARE_S = 20  # of the budget, for the report


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark of the suite: the seconds that it takes on two cores, and in a smoke run (None: left out of one).

    `budgeted`: it takes `--minutes` and ends by itself. `short`: only its smoke run fits, so a whole run of the same
    commit that is there is shown instead.
    """

    name: str
    takes_s: float
    smoke_s: float | None = None
    budgeted: bool = False
    short: bool = False
    options: Sequence[str] = ()
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
_TAKES_OTHERWISE_S = 90.0


def run_all(
    benchmarks: Mapping[str, str], bundle: Path, results: Path, *, smoke: bool, minutes: float | None
) -> tuple[Path, dict[str, Any]]:
    """Run what fits and fold in what is there; the path of `all.json` and what is in it. `all.html` lies beside it."""
    minutes = minutes or (SMOKE_MINUTES if smoke else MINUTES)
    began = time.monotonic()
    ends = began + 60 * minutes - (0 if smoke else _SPARE_S)
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "minutes": minutes})
    folder = results_folder(results, run)
    figures: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    took_s: dict[str, float] = {}
    for part in _parts(benchmarks):
        if part.short and not smoke and (kept := _kept(folder, part.name, bundle, smoke=False)) is not None:
            figures[part.name] = kept
            left_out[part.name] = _EARLIER
            continue
        needed = part.smoke_s if smoke else part.takes_s
        left = ends - time.monotonic()
        if needed is None or (left < needed and not (part.budgeted and left > needed / 2)):
            left_out[part.name] = "not run within the time given"
            continue
        print(f"{part.name}: {left:.0f} s left", file=sys.stderr)  # noqa: T201 - progress of a command
        started = time.monotonic()
        outcome = _run(
            part, bundle, results, smoke=smoke, seconds=min(needed, left), most_s=left + (_OVERTIME_S if smoke else 0)
        )
        took_s[part.name] = round(time.monotonic() - started, 1)
        if isinstance(outcome, str):
            left_out[part.name] = outcome
        else:
            figures[part.name] = outcome
    for name in set(left_out) - set(figures):
        if (kept := _kept(folder, name, bundle, smoke=smoke)) is not None:
            figures[name] = kept
            left_out[name] += f"; {_EARLIER}"
    run["settings"] |= {"took_s": took_s, "left_out": left_out}
    run["minutes"] = round((time.monotonic() - began) / 60, 1)
    outcome = {**run, "figures": figures}
    path = write_results(results, "all", outcome)
    atomic_write_bytes(path.with_suffix(".html"), report(benchmarks, outcome).encode())
    return path, outcome


def _kept(folder: Path, name: str, bundle: Path, *, smoke: bool) -> Any:
    """The figures of a run that is there, of the same bundle and as large; None where there is none."""
    try:
        run = json.loads((folder / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None
    alike = run["settings"].get("bundle") == bundle.name and run["settings"].get("smoke") is smoke
    return run["figures"] if alike else None


def _parts(benchmarks: Mapping[str, str]) -> Iterator[Part]:
    """Those of the suite that there are, then all others."""
    yield from (part for part in PARTS if part.name in benchmarks)
    known = {part.name for part in PARTS}
    yield from (Part(name=name, takes_s=_TAKES_OTHERWISE_S) for name in benchmarks if name not in known)


def _run(
    part: Part, bundle: Path, results: Path, *, smoke: bool, seconds: float, most_s: float
) -> dict[str, Any] | str:
    """The figures, or why there are none. It is told to end, as by Ctrl-C, after `most_s`."""
    command = [
        sys.executable, "-m", "wikiclip", "bench", part.name, "--json",
        "--bundle", str(bundle), "--results", str(results),
        *(("--smoke",) if smoke or part.short else ()), *(part.smoke_options if smoke else part.options),
        *(("--minutes", f"{seconds / 60:.2f}") if part.budgeted else ()),
    ]  # fmt: skip
    # A session of its own, so that all that it started can be told to end.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,  # noqa: PLW1509 - the suite has no threads
    )
    try:
        said, complained = process.communicate(timeout=max(most_s, 0.1))
    except subprocess.TimeoutExpired:
        said, complained = _end(process)
        if process.returncode:  # else it had done all but end
            return f"stopped after {most_s:.0f} s, the time that was left"
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        lines = complained.strip().splitlines() or [f"exit code {process.returncode}"]
        return lines[-1].removeprefix("error: ")
    figures: dict[str, Any] = json.loads(said.splitlines()[-1])["figures"]
    return figures


def _heed_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would all that this starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Have it end; what it said on both its streams."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=_GRACE_S)
    raise RuntimeError(f"process {process.pid} does not end, though it was killed")


def report(benchmarks: Mapping[str, str], outcome: dict[str, Any]) -> str:
    """One page: what it ran on, then every benchmark's own report, or its figures in a table."""
    hardware = outcome["hardware"]
    rows = [[key, str(value)] for key, value in hardware.items() if key != "name"]
    rows += [["commit", outcome["commit"]], ["date", outcome["date"]], ["minutes", str(outcome["minutes"])]]
    parts = [section("What this ran on", table(["", ""], rows))]
    for name, figures in outcome["figures"].items():
        module = importlib.import_module(benchmarks[name])
        body = body_of(module.report(figures)) if hasattr(module, "report") else figures_table(figures)
        parts.append(f'<article id="{name}"><h1>{name.capitalize()}</h1>\n{body}</article>')
    if left_out := outcome["settings"]["left_out"]:
        parts.append(section("Left out", table(["benchmark", "why"], [list(row) for row in left_out.items()])))
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in outcome["figures"])
    return page(f"Benchmarks on {hardware['name']}", "\n".join((f"<p>{links}</p>", *parts)))
