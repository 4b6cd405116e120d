"""`wikiclip bench compare A B`: what changed between two runs beyond noise, from their raw samples.

A metric is anything in the figures with `samples` and `better`, whatever benchmark it is of. By how much it changed is
read off the better quarter of its samples, since what else a machine does makes samples worse and hardly ever better;
whether it did is a permutation test of the ranks of all samples, corrected for how many metrics there are (Holm). Both
are done twice, with the samples as they are and divided by the reference that was timed beside each. The lesser of the
two changes counts: a machine that is slower all day is no regression, nor is a reference that was disturbed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import BEFORE
from core.errors import UserError
from evaluation.metrics import percentile_interval

THRESHOLD = 0.2
LEAST_SAMPLES = 5
_SIGNIFICANT = 0.01
_PERMUTATIONS = 20_000
_RESAMPLINGS = 2000
_QUARTER = 25  # percent: the better quarter

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric in both runs. `worse` is how many times as bad B is as A (1: alike), `interval` that of it, in 95 %."""

    name: str
    unit: str
    before: float
    after: float
    worse: float
    interval: tuple[float, float]
    p: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "interval": list(self.interval)}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Changes, worst first, and the metrics that only one run has."""

    changes: list[Change]
    only_in_one: list[str]
    threshold: float

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "regression"]


def read_run(path: Path) -> dict[str, Any]:
    """The outcome in a file, or in a folder of results (`all.json` where there is one, else all files together).

    Raises `UserError` where there is none.
    """
    try:
        if path.is_dir():
            whole = path / "all.json"
            files = [whole] if whole.exists() else sorted(f for f in path.glob("*.json") if not f.name.endswith(BEFORE))
            runs = [json.loads(file.read_bytes()) for file in files]
            if not runs:
                raise UserError(f"{path} holds no results; name a file or folder that `wikiclip bench` wrote")
            if len(runs) == 1:
                return dict(runs[0])
            return {**runs[0], "figures": {file.stem: run["figures"] for file, run in zip(files, runs, strict=True)}}
        run: dict[str, Any] = json.loads(path.read_bytes())
        run["figures"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results of `wikiclip bench` ({error})") from error
    return run


def compare(before: dict[str, Any], after: dict[str, Any], *, threshold: float = THRESHOLD) -> Comparison:
    """Two outcomes, A and B. `threshold` is the share that B must be worse by to be a regression.

    Raises `UserError` where the runs were of different settings or have no metric in common.
    """
    one, other = (dict(metrics_of(run["figures"])) for run in (before, after))
    common = [name for name in one if name in other]
    if not common:
        raise UserError("the two runs have no metric with samples in common; compare runs of one benchmark")
    raw = [_judge(name, one[name], other[name]) for name in common]
    adjusted = _holm([change.p for change in raw])
    changes = [
        replace(change, p=p, verdict=_verdict(change, p, threshold, len(one[change.name]["samples"]),
                                              len(other[change.name]["samples"])))
        for change, p in zip(raw, adjusted, strict=True)
    ]  # fmt: skip
    return Comparison(
        changes=sorted(changes, key=lambda change: -change.worse),
        only_in_one=sorted(set(one) ^ set(other)),
        threshold=threshold,
    )


def metrics_of(figures: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every metric with samples in nested figures, by its path."""
    if not isinstance(figures, dict):
        return
    if figures.get("samples") and "better" in figures:
        yield path, figures
        return
    for name, below in figures.items():
        yield from metrics_of(below, f"{path}/{name}" if path else name)


def _judge(name: str, one: dict[str, Any], other: dict[str, Any]) -> Change:
    rng = np.random.default_rng(0)
    raw = [_costs(one), _costs(other)]
    tests = [raw]
    if one.get("reference_ms") and other.get("reference_ms"):
        tests.append([costs - np.log(run["reference_ms"]) for costs, run in zip(raw, (one, other), strict=True)])
    # By how much: as the one says that sees less. Whether at all: as the clearer one says, corrected for two tries.
    shifts = [_quiet(b) - _quiet(a) for a, b in tests]
    least = min(shifts, key=abs) if len({np.sign(shift) for shift in shifts}) == 1 else 0.0
    p = min(1.0, len(tests) * min(_permutation_p(a, b, rng) for a, b in tests))
    a, b = tests[shifts.index(least)] if least in shifts else raw
    drawn = np.exp(_resampled(b, rng) - _resampled(a, rng))
    return Change(
        name=name,
        unit=one.get("unit", ""),
        before=_natural(raw[0], one["better"]),
        after=_natural(raw[1], other["better"]),
        worse=round(float(np.exp(least)), 3),
        interval=(round(percentile_interval(drawn)[0], 3), round(percentile_interval(drawn)[1], 3)),
        p=p,
        verdict="",
    )


def _costs(metric: dict[str, Any]) -> Floats:
    """Logarithms that are the lower the better."""
    values = np.log(np.asarray(metric["samples"], np.float64))
    return values if metric["better"] == "lower" else -values


def _quiet(costs: Floats) -> float:
    return float(np.percentile(costs, _QUARTER))


def _natural(costs: Floats, better: str) -> float:
    quiet = _quiet(costs)
    return float(f"{np.exp(quiet if better == 'lower' else -quiet):.5g}")


def _permutation_p(one: Floats, other: Floats, rng: np.random.Generator) -> float:
    """How often a random split of all samples differs by as much in its ranks: two-sided, ties share their rank."""
    pooled = np.concatenate([one, other])
    ordered = np.sort(pooled)
    ranks = np.searchsorted(ordered, pooled, "left") + np.searchsorted(ordered, pooled, "right")
    shuffled = rng.permuted(np.broadcast_to(ranks, (_PERMUTATIONS, len(ranks))), axis=1)
    drawn = np.abs(shuffled[:, : len(one)].mean(axis=1) - ranks.mean())
    observed = abs(ranks[: len(one)].mean() - ranks.mean())
    return float((1 + (drawn >= observed - 1e-9).sum()) / (1 + _PERMUTATIONS))


def _resampled(costs: Floats, rng: np.random.Generator) -> Floats:
    drawn: Floats = np.percentile(rng.choice(costs, (_RESAMPLINGS, len(costs))), _QUARTER, axis=1)
    return drawn


def _holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for as many tests (Holm, 1979): the k-th smallest times what is left, never below one before it."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, p_values[position] * (len(p_values) - rank)))
        adjusted[position] = round(least, 5)
    return adjusted


def _verdict(change: Change, p: float, threshold: float, *samples: int) -> str:
    if min(samples) < LEAST_SAMPLES:
        return f"fewer than {LEAST_SAMPLES} samples: cannot be told"
    if p > _SIGNIFICANT:
        return "within noise"
    if change.worse > 1 + threshold:
        return "regression"
    if change.worse < 1 / (1 + threshold):
        return "improvement"
    return "changed by less than the threshold"


def as_text(comparison: Comparison) -> str:
    """A line for each metric, worst first, and what it comes to."""
    width = max(len(change.name) for change in comparison.changes)
    lines = [f"{'metric':<{width}} {'A':>10} {'B':>10}         {'times as bad':>12}"]
    for change in comparison.changes:
        low, high = change.interval
        lines.append(
            f"{change.name:<{width}} {change.before:>10.4g} {change.after:>10.4g} {change.unit:<8}"
            f"{change.worse:>6.2f} ({low:.2f} to {high:.2f})  {change.verdict}"
        )
    lines += [f"{name}: in one run only" for name in comparison.only_in_one]
    count = len(comparison.regressions)
    past = f"past {100 * comparison.threshold:.0f} %"
    lines.append(f"{count} regression(s) {past}" if count else f"no regression {past}")
    return "\n".join(lines)
