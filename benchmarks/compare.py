"""`wikiclip bench compare A B`: what changed between two runs beyond noise, from their raw samples.

A metric is anything in the figures with `samples` and `better`. The size of a change comes from the better quarter of
the samples, because other work on a machine makes samples worse and hardly ever better. It is computed twice, from the
samples as they are and relative to the reference timed next to each. The smaller change counts: neither a machine that
is slower all day nor a disturbed reference is a regression. A change is a regression or an improvement if its whole
bootstrap interval is past the threshold.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import BEFORE
from core.arrays import Float64Array
from core.errors import UserError
from evaluation.metrics import RESAMPLINGS, percentile_interval

THRESHOLD = 0.2
MIN_SAMPLES = 5
_QUARTER = 25  # percent: the better quarter


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric in both runs. `worse` is by how many times B is worse than A (1: equal), with its 95 % interval."""

    name: str
    unit: str
    before: float
    after: float
    worse: float
    interval: tuple[float, float]
    verdict: str


def read_run(path: Path) -> dict[str, Any]:
    """Return the outcome in a file or in a folder of results: `all.json` if there is one, otherwise all files together.

    Raise `UserError` if there is none.
    """
    files = [path]
    if path.is_dir():
        whole = path / "all.json"
        files = [whole] if whole.exists() else sorted(f for f in path.glob("*.json") if not f.name.endswith(BEFORE))
    try:
        figures = {file.stem: json.loads(file.read_bytes())["figures"] for file in files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results of `wikiclip bench` ({error})") from error
    if not figures:
        raise UserError(f"{path} has no results; name a file or folder that `wikiclip bench` wrote")
    return {"figures": figures if len(figures) > 1 else figures[files[0].stem]}


def compare(before: dict[str, Any], after: dict[str, Any], *, threshold: float = THRESHOLD) -> list[Change]:
    """Return the changes from run A to B, the worst first. A regression is worse by more than the share `threshold`.

    Raise `UserError` if the runs have no metric in common.
    """
    one, other = (dict(metrics_of(run["figures"])) for run in (before, after))
    common = [name for name in one if name in other]
    if not common:
        raise UserError("the two runs have no metric with samples in common; compare runs of one benchmark")
    changes = [_change(name, one[name], other[name], threshold=threshold) for name in common]
    return sorted(changes, key=lambda change: -change.worse)


def regressions(changes: Sequence[Change]) -> list[str]:
    """Return the names of the metrics that became worse."""
    return [change.name for change in changes if change.verdict == "regression"]


def metrics_of(figures: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every metric with samples in nested figures, with its path."""
    if not isinstance(figures, dict):
        return
    if figures.get("samples") and "better" in figures:
        yield path, figures
        return
    for name, below in figures.items():
        yield from metrics_of(below, f"{path}/{name}" if path else name)


def _change(name: str, one: dict[str, Any], other: dict[str, Any], *, threshold: float) -> Change:
    sign = 1 if one["better"] == "lower" else -1
    raw = [sign * np.log(run["samples"]) for run in (one, other)]  # of costs, lower is better
    shifts = [_shift(*raw)]
    if one.get("reference_ms") and other.get("reference_ms"):
        relative = [costs - np.log(run["reference_ms"]) for costs, run in zip(raw, (one, other), strict=True)]
        shifts.append(_shift(*relative))
    least = min(shifts, key=lambda shift: abs(shift[0]))
    low, worse, high = (round(float(np.exp(value)), 3) for value in (least[1], least[0], least[2]))
    verdict = "within noise or the threshold"
    if min(len(run["samples"]) for run in (one, other)) < MIN_SAMPLES:
        verdict = f"fewer than {MIN_SAMPLES} samples: undecided"
    elif all(low > np.log(1 + threshold) for _, low, _ in shifts):
        verdict = "regression"
    elif all(high < -np.log(1 + threshold) for _, _, high in shifts):
        verdict = "improvement"
    return Change(
        name=name,
        unit=one.get("unit", ""),
        before=float(np.exp(sign * _quiet(raw[0]))),
        after=float(np.exp(sign * _quiet(raw[1]))),
        worse=worse,
        interval=(low, high),
        verdict=verdict,
    )


def _shift(before: Float64Array, after: Float64Array) -> tuple[float, float, float]:
    """Return by how much the better quarter moved, and the 95 % bootstrap interval of that."""
    rng = np.random.default_rng(0)
    after_R, before_R = (_quiet(rng.choice(costs, (RESAMPLINGS, len(costs)))) for costs in (after, before))
    return float(_quiet(after) - _quiet(before)), *percentile_interval(after_R - before_R)


def _quiet(costs: Float64Array) -> Float64Array:
    return np.asarray(np.percentile(costs, _QUARTER, axis=-1))


def as_text(changes: Sequence[Change], threshold: float = THRESHOLD) -> str:
    """Return a line for each metric, worst first, and a conclusion."""
    width = max(len(change.name) for change in changes)
    lines = [f"{'metric':<{width}} {'A':>10} {'B':>10}         {'times as bad':>12}"]
    for change in changes:
        low, high = change.interval
        lines.append(
            f"{change.name:<{width}} {change.before:>10.4g} {change.after:>10.4g} {change.unit:<8}"
            f"{change.worse:>6.2f} ({low:.2f} to {high:.2f})  {change.verdict}"
        )
    count = len(regressions(changes))
    lines.append(f"{count or 'no'} regression{'(s)' if count else ''} past {100 * threshold:.0f} %")
    return "\n".join(lines)
