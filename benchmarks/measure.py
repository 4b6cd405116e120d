"""Timing, statistics and result files that all benchmarks share.

`sample` times several things in turn, in one run. Each round times each of them for a moment, in a rotating order, and
next to it a fixed reference whose time tells how fast the machine is at that moment. Other work on the machine then
affects all of them alike, and `wikiclip bench compare` can tell it from a change in the code.
"""

import json
import re
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from core.arrays import Float64Array
from core.errors import UserError
from core.files import atomic_write_bytes
from evaluation.metrics import RESAMPLINGS, Interval, percentile_interval
from evaluation.pages import Report, figures_page, require_libraries

BEFORE = ".before.json"  # suffix of the previous run's file
MACHINE = Report(title="Hardware and commit")  # of a page, for what `describe_run` returns
Parts = Mapping[str, tuple[Report, Any]]  # by name, what to show of which figures
_MAX_CALLS_PER_ROUND = 200
_REFERENCE_RUNS = 3


def process_memory_bytes(pid: int) -> dict[str, int]:
    """Return a process's `own` memory and that of `mapped` files. Raises `OSError` if it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = dict(re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", status, re.MULTILINE))
    return {kind: 1024 * int(kib.get(name, 0)) for kind, name in (("own", "RssAnon"), ("mapped", "RssFile"))}


def median_interval(samples: Sequence[float]) -> Interval:
    """Return the 95 % bootstrap interval of the median."""
    return percentile_interval(_resampled_medians(samples))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the 95 % bootstrap interval of the ratio of two medians. Both are resampled with the same indices."""
    above_R, below_R = (_resampled_medians(each) for each in (numerators, denominators))
    return [round(bound, 2) for bound in percentile_interval(above_R / below_R)]


def _resampled_medians(samples: Sequence[float]) -> Float64Array:
    drawn = np.random.default_rng(0).choice(samples, (RESAMPLINGS, len(samples)))
    return np.asarray(np.median(drawn, axis=1))


def percentiles_ms(call: Callable[[int], object], *, repeats: int, warm_up: int) -> dict[str, float]:
    """Return p50, p90 and p99 in milliseconds of `call(i)`. The `warm_up` calls before are not counted."""
    for i in range(warm_up):
        call(i)
    durations_ms = np.empty(repeats)
    for i in range(repeats):
        started = time.perf_counter()
        call(warm_up + i)
        durations_ms[i] = 1000 * (time.perf_counter() - started)
    p50, p90, p99 = np.percentile(durations_ms, (50, 90, 99)).round(3).tolist()
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing to time: `call(i)` gets a growing number and processes `items` items.

    `name` is a path in the figures, such as `search/10000 exact`.
    """

    name: str
    call: Callable[[int], object]
    items: int = 1


@dataclass(kw_only=True)
class Metric:
    """The samples of one figure, and the time of the reference next to each."""

    unit: str = "ms"
    better: str = "lower"  # or "higher"
    samples: list[float] = field(default_factory=list)
    reference_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return the median, its 95 % interval and every sample, as `wikiclip bench compare` reads them."""
        return {
            "median": _rounded(float(np.median(self.samples))),
            "interval": [_rounded(bound) for bound in median_interval(self.samples)],
            "unit": self.unit,
            "better": self.better,
            "samples": [_rounded(value) for value in self.samples],
            "reference_ms": [_rounded(value) for value in self.reference_ms],
        }


def _reference() -> Callable[[], float]:
    """Return a function that times fixed work on one core, in ms: matrices, a pass over memory and a Python loop."""
    matrix, memory = np.ones((192, 192), np.float32), np.ones(2_000_000, np.float32)

    def work() -> None:
        np.einsum("ij,jk->ik", matrix, matrix)  # einsum is single-threaded, unlike BLAS
        float(memory.sum())
        sum(number * number for number in range(20_000))

    return lambda: 1000 * min(timeit.repeat(work, number=1, repeat=_REFERENCE_RUNS))


def sample(
    probes: Sequence[Probe], *, rounds: int, moment_s: float, until: float | None = None, description: str = "rounds"
) -> dict[str, Metric]:
    """Return milliseconds per item of each probe.

    Each round gives one sample, the median of the calls within `moment_s` seconds. Stop early, after at least two
    rounds, once `time.monotonic()` is past `until`.
    """
    reference_ms = _reference()
    metrics = {probe.name: Metric() for probe in probes}
    calls = dict.fromkeys(metrics, 0)
    for probe in probes:
        probe.call(0)  # warm up
    order = list(probes)
    for done in tqdm(range(rounds), desc=description, unit="round"):
        if done >= 2 and until is not None and time.monotonic() > until:
            break
        order = order[1:] + order[:1]
        for probe in order:
            metrics[probe.name].reference_ms.append(reference_ms())
            durations: list[float] = []
            while not durations or (sum(durations) < moment_s and len(durations) < _MAX_CALLS_PER_ROUND):
                calls[probe.name] += 1
                started = time.perf_counter()
                probe.call(calls[probe.name])
                durations.append(time.perf_counter() - started)
            metrics[probe.name].samples.append(1000 * float(np.median(durations)) / probe.items)
    return metrics


def nested(metrics: dict[str, Metric]) -> dict[str, Any]:
    """Return the figures of metrics whose names are paths, as nested objects."""
    tree: dict[str, Any] = {}
    for name, metric in metrics.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = metric.figures()
    return tree


def write_outcome(folder: Path, name: str, outcome: dict[str, Any], title: str, parts: Parts) -> None:
    """Write `FOLDER/<hardware>-<date>-<commit>/NAME.json`, and its figures as NAME.html if there is a report.

    A previous run of the same commit is kept as `NAME.before.json`, so the two can be compared. Without the packages
    that a report needs, print what to install instead.
    """
    path = results_folder(folder, outcome) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(f"{name}{BEFORE}"))
    atomic_write_bytes(path, json.dumps(outcome, indent=1).encode())
    click.echo(f"written to {path}", err=True)
    if parts:
        try:
            require_libraries()
        except UserError as error:
            click.echo(f"no HTML report: {error}", err=True)
        else:
            atomic_write_bytes(path.with_suffix(".html"), figures_page(title, parts).encode())


def results_folder(folder: Path, run: dict[str, Any]) -> Path:
    """Return the folder for results of this hardware, date and commit."""
    label = f"{run['hardware']['name']}-{run['date']}-{run['commit']}"
    return folder / re.sub(r"[^A-Za-z0-9.-]+", "_", label)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
