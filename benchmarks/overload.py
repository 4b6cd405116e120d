"""`wikiclip bench overload`: ten times more than the service can do, open loop, for a minute, and what comes after.

First as much as it can do (closed loop), then ten times that in arrivals that wait for nobody, then a third of it. What
is accepted must be answered within the deadline, the rest be told 429 with a `Retry-After`; memory stays flat, and two
seconds after the flood requests are answered as if there had been none.
"""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.closed_loop import Job, run_job
from benchmarks.open_loop import Sent, run_open_loop
from benchmarks.server import running_service, scrape_metrics, split_cores, thread_flags
from benchmarks.synthetic import encoder_bundles, write_photographs
from evaluation.pages import Series, line_plot, page, section, table

TIMES = 10
IMAGES = 16
PEAK_S, FLOOD_S, AFTER_S = 10.0, 60.0, 10.0
SMOKE_PEAK_S, SMOKE_FLOOD_S, SMOKE_AFTER_S = 3.0, 8.0, 5.0
DEADLINE_MS = 5000
SETTLING_S = 1.0  # of the flood, before it counts; within it the service learns how fast it is
RECOVERED_AFTER_S = 2.0
GOODPUT_SHARE = 0.9  # aimed at


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """By encoder (the bundle's own, and without `smoke` a ViT-B/32 in int8): goodput of the flood against the peak, p99
    of what was accepted, statuses, memory, and the answers from two seconds after the flood on."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = write_photographs(work, IMAGES, 640, 480)
        bundles = encoder_bundles(bundle_path, work, smoke=smoke)
        encoders = {name: _flood(bundle, images, work, smoke=smoke) for name, bundle in bundles.items()}
    generator, service = split_cores()
    return {
        "encoders": encoders,
        "times": TIMES,
        "deadline_ms": DEADLINE_MS,
        "image": "JPEG 640x480",
        "cores": {"generator": sorted(generator), "service": sorted(service)},
    }


def _flood(bundle: Path, images: list[str], work: Path, *, smoke: bool) -> dict[str, Any]:
    generator, service = split_cores()
    peak_s, flood_s, after_s = (SMOKE_PEAK_S, SMOKE_FLOOD_S, SMOKE_AFTER_S) if smoke else (PEAK_S, FLOOD_S, AFTER_S)
    flags = (*thread_flags(len(service)), "--deadline-ms", str(DEADLINE_MS))
    with running_service(
        bundle, *flags, "--device", "cpu", "--cache", "off", "--log-level", "error", cores=service
    ) as url:
        asked = f"{url}/recognize?top_k=5"
        job = Job(
            url=asked, images=images, field=None, connections=8 * len(service), warm_up_s=1.0, seconds=peak_s
        )  # fmt: skip
        peak = run_job(job, work, generator)["per_s"]
        with _Memory(url) as memory:
            phases = ((TIMES * peak, flood_s), (peak / 3, after_s))
            sent = run_open_loop(asked, images, work, generator, phases=phases)
    return {"peak_per_s": peak, **summary(sent, peak, flood_s, after_s), "memory_mib": memory.samples_mib}


def summary(sent: Sequence[Sent], peak: float, flood_s: float, after_s: float) -> dict[str, Any]:
    """What the requests of a flood of `flood_s` seconds and of the time after it show."""
    flood = [each for each in sent if SETTLING_S <= each.at_s < flood_s]
    after = [each for each in sent if flood_s + RECOVERED_AFTER_S <= each.at_s]
    accepted_ms = [each.took_ms for each in flood if each.status == httpx.codes.OK]
    # What was answered while the flood lasted, whenever it had been asked.
    answered = sum(
        each.status == httpx.codes.OK and SETTLING_S <= each.at_s + each.took_ms / 1000 < flood_s for each in sent
    )
    refused = [each for each in flood if each.status == httpx.codes.TOO_MANY_REQUESTS]
    goodput = answered / (flood_s - SETTLING_S)
    return {
        "offered_per_s": round(len(flood) / (flood_s - SETTLING_S), 1),
        "goodput_per_s": round(goodput, 2),
        "goodput_share": round(goodput / peak, 3),
        "accepted_p99_ms": round(float(np.percentile(accepted_ms, 99)), 1) if accepted_ms else None,
        "refused_p99_ms": round(float(np.percentile([each.took_ms for each in refused], 99)), 1) if refused else None,
        "statuses": dict(Counter(str(each.status) for each in flood)),
        "refused_without_retry_after": sum(not each.retry_after for each in refused),
        "after": {
            "requests": len(after),
            "statuses": dict(Counter(str(each.status) for each in after)),
            "p99_ms": round(float(np.percentile([each.took_ms for each in after], 99)), 1) if after else None,
        },
        "timeline": _timeline(sent, flood_s + after_s),
    }


def _timeline(sent: Sequence[Sent], whole_s: float) -> list[dict[str, int]]:
    """Requests answered and refused in each second."""
    seconds = [{"second": number, "answered": 0, "refused": 0} for number in range(int(whole_s))]
    for each in sent:
        ended = int(each.at_s + each.took_ms / 1000)
        key = {httpx.codes.OK: "answered", httpx.codes.TOO_MANY_REQUESTS: "refused"}.get(
            httpx.codes(each.status or 500)
        )
        if key is not None and ended < len(seconds):
            seconds[ended][key] += 1
    return seconds


class _Memory:
    """Resident memory of the service in MiB, as `/metrics` tells it, every second."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.samples_mib: list[float] = []

    def __enter__(self) -> _Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            resident = scrape_metrics(self._url)["process_resident_memory_bytes"]
            self.samples_mib.append(round(resident / 1024**2, 1))


def report(figures: dict[str, Any]) -> str:
    """An HTML page: answers and refusals in each second, and the figures by encoder."""
    blocks = []
    for name, each in figures["encoders"].items():
        series = [
            Series(name=key, points=[(point["second"], point[key]) for point in each["timeline"]])
            for key in ("answered", "refused")
        ]
        plot = line_plot(series, title=f"Overload, {name}", x_label="seconds", y_label="requests/s")
        keys = ("peak_per_s", "offered_per_s", "goodput_per_s", "goodput_share", "accepted_p99_ms", "refused_p99_ms")
        rows = [[key, str(each[key])] for key in (*keys, "statuses", "refused_without_retry_after", "after")]
        memory = each["memory_mib"]
        if memory:
            rows.append(["memory, MiB: first, most, last", f"{memory[0]}, {max(memory)}, {memory[-1]}"])
        blocks.append(section(f"Encoder: {name}", plot, table(("", "figure"), rows)))
    said = (
        f"<p>{figures['times']} times the peak, open loop; deadline {figures['deadline_ms']} ms. Aimed at: goodput at "
        f"least {GOODPUT_SHARE:.0%} of the peak, p99 of what is accepted within the deadline, the rest 429, as "
        f"before {RECOVERED_AFTER_S:g} s after the flood.</p>"
    )
    return page("Overload", "\n".join((said, *blocks)))
