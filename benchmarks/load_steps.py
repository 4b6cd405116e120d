"""Offered load over time, in steps, and what came of each: what the Locust file and `wikiclip bench load` share.

Only Python's own library is used, so that the Locust file runs where nothing but Locust is installed.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHAPES = ("ramp", "steady", "spike", "soak")
MOST_STEPS = 24  # of a ramp
IN_TIME_MS = 1000  # an answer later than this is no answer to a person who waits
KEPT_UP = 0.95  # share of what was offered that a service has to answer in time to be below its knee
SETTLING = 0.3  # share of a step that is left to the change of load before it counts


@dataclass(kw_only=True)
class Step:
    """A stretch of constant offered load: `rate` requests a second for `length_s` seconds."""

    rate: float
    length_s: float
    latencies_ms: list[float] = field(default_factory=list)  # of answers, not of refusals
    failures: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    @property
    def users(self) -> int:
        return max(1, round(self.rate))

    def note(self, kind: str, after_s: float, took_ms: float, failure: str | None) -> None:
        """Count a request sent `after_s` seconds into the step; those sent while the load settles do not count."""
        if not SETTLING * self.length_s <= after_s < self.length_s:
            return
        self.kinds[kind] += 1
        if failure is None:
            self.latencies_ms.append(took_ms)
        else:
            self.failures[failure] += 1

    def merge(self, other: Step) -> None:
        self.latencies_ms += other.latencies_ms
        self.failures += other.failures
        self.kinds += other.kinds

    def figures(self) -> dict[str, Any]:
        """Requests a second offered, answered, and answered in time; latency percentiles of answers in ms; shares
        refused and failed."""
        requests = sum(self.kinds.values())
        refused = sum(count for reason, count in self.failures.items() if reason.startswith("refused"))
        failed = sum(self.failures.values()) - refused
        counted_s = self.length_s * (1 - SETTLING)
        ordered = sorted(self.latencies_ms)
        return {
            "planned_per_s": round(self.rate, 2),
            "offered_per_s": round(requests / counted_s, 2),
            "answered_per_s": round(len(self.latencies_ms) / counted_s, 2),
            "in_time_per_s": round(sum(taken <= IN_TIME_MS for taken in self.latencies_ms) / counted_s, 2),
            **{f"p{percent}_ms": _percentile(ordered, percent) for percent in (50, 90, 99)},
            "requests": requests,
            "refused_share": round(refused / requests, 4) if requests else 0.0,
            "failed_share": round(failed / requests, 4) if requests else 0.0,
            "kinds": dict(sorted(self.kinds.items())),
            "failures": dict(sorted(self.failures.items())),
        }

    def kept_up(self) -> bool:
        """Whether all but a few of the requests offered were answered in time."""
        return kept_up(self.figures())


def kept_up(figures: dict[str, Any]) -> bool:
    """As `Step.kept_up`, from a step's figures."""
    return bool(figures["requests"] and figures["in_time_per_s"] >= KEPT_UP * figures["offered_per_s"])


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """Between the two values nearest to the place, as numpy does it; None of nothing."""
    if not ordered:
        return None
    place = percent / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return round(ordered[low] + (place - low) * (ordered[high] - ordered[low]), 2)


@dataclass(frozen=True)
class Plan:
    steps: tuple[Step, ...]
    stops_past_knee: bool = False

    def at(self, seconds: float) -> Step | None:
        """The step that is on `seconds` after the start; None when all are over."""
        for step in self.steps:
            if seconds < step.length_s:
                return step
            seconds -= step.length_s
        return None


def plan_of(options: Namespace) -> Plan:
    """The steps of `--shape`: `ramp` grows until the service no longer keeps up, `steady` and `soak` hold the rate (a
    soak in steps of a minute), `spike` multiplies it for one step and goes back."""
    rate, step_s = options.rate, options.step_s
    if options.shape == "ramp":
        rates = [rate * options.growth**number for number in range(MOST_STEPS)]
        return Plan(tuple(Step(rate=each, length_s=step_s) for each in rates), stops_past_knee=True)
    if options.shape == "spike":
        rates = [rate, rate * options.spike, rate, rate]
        return Plan(tuple(Step(rate=each, length_s=step_s) for each in rates))
    length_s = min(60.0, 60 * options.minutes)
    if options.shape == "steady":
        length_s = 60 * options.minutes
    count = math.ceil(60 * options.minutes / length_s)
    return Plan(tuple(Step(rate=rate, length_s=length_s) for _ in range(count)))


def knee(steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of a ramp's figures, the last step in which the service kept up with what was offered; None if in none."""
    return max(filter(kept_up, steps), key=lambda step: float(step["offered_per_s"]), default=None)


def until_behind(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A ramp's figures through the first step in which the service fell behind: a step begun after it was cut off."""
    behind = next((number for number, step in enumerate(steps) if not kept_up(step)), len(steps))
    return list(steps[: behind + 1])
