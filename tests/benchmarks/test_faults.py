"""What the benchmarks under fire send, and what they make of the answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.open_loop import Sent, run_open_loop
from benchmarks.overload import report, summary
from benchmarks.server import running_service, split_cores


def test_the_open_loop_asks_whatever_the_answers_take(
    small_bundle: Path, small_images: dict[str, bytes], tmp_path: Path
) -> None:
    image, broken = tmp_path / "image.png", tmp_path / "broken.jpg"
    image.write_bytes(small_images["Q15083"])
    broken.write_bytes(b"no image")
    generator, _ = split_cores()
    with running_service(small_bundle, "--log-level", "warning", "--threads", "1") as url:
        sent = run_open_loop(
            f"{url}/recognize", [str(image), str(broken)], tmp_path, generator, phases=((20.0, 1.0), (10.0, 1.0))
        )
    assert sent
    assert {each.status for each in sent} <= {200, 422}
    assert all(each.at_s >= 0 for each in sent)


def test_goodput_is_what_was_answered_while_the_flood_lasted() -> None:
    flood = [Sent(1 + n / 10, 500.0, 200, False) for n in range(90)]  # answered until 10.4 s: five too late
    refused = [Sent(5.0, 2.0, 429, n > 0) for n in range(3)]
    after = [Sent(12.5, 20.0, 200, False), Sent(11.0, 9000.0, 200, False)]  # the second is within the time to recover
    found = summary([*flood, *refused, *after], peak=10.0, flood_s=10.0, after_s=5.0)
    assert found["goodput_per_s"] == pytest.approx(85 / 9, abs=0.01)
    assert found["goodput_share"] == pytest.approx(0.944, abs=0.001)
    assert found["accepted_p99_ms"] == 500.0
    assert found["statuses"] == {"200": 90, "429": 3}
    assert found["refused_without_retry_after"] == 1
    assert found["after"] == {"requests": 1, "statuses": {"200": 1}, "p99_ms": 20.0}
    assert sum(second["refused"] for second in found["timeline"]) == 3
    figures = {"peak_per_s": 10.0, **found, "memory_mib": [1.0, 2.0]}
    html = report({"encoders": {"own": figures}, "times": 10, "deadline_ms": 5000})
    assert "0.944" in html
