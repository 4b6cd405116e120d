"""The figures of an overload."""

from __future__ import annotations

import pytest

from benchmarks.generator import Response
from benchmarks.overload import summary


def respond(at_s: float, took_ms: float, status: int, retry_after: bool = False) -> Response:
    return Response(at_s, took_ms, status, retry_after, "")


def test_goodput_counts_what_is_answered_during_the_overload() -> None:
    overload = [respond(1 + n / 10, 500.0, 200) for n in range(90)]  # the last is answered at 10.4 s, five are too late
    refused = [respond(5.0, 2.0, 429, n > 0) for n in range(3)]
    after = [respond(12.5, 20.0, 200), respond(11.0, 9000.0, 200)]  # the second is sent during the recovery
    found = summary([*overload, *refused, *after], peak=10.0, overload_s=10.0, after_s=5.0)
    assert found["goodput_per_s"] == pytest.approx(85 / 9, abs=0.01)
    assert found["goodput_share"] == pytest.approx(0.944, abs=0.001)
    assert found["accepted_p99_ms"] == 500.0
    assert found["statuses"] == {"200": 85, "429": 3}
    assert found["refused_without_retry_after"] == 1
    assert found["after"] == {"statuses": {"200": 1}, "p99_ms": 20.0}
