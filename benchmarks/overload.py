"""`wikiclip bench overload`: offer ten times the capacity of a service for a minute, open loop, then a third of it.

A closed loop finds the capacity first. During the overload, accepted requests should be answered within the deadline,
all others should get 429 with `Retry-After`, and memory should not grow. Two seconds later, nothing should be refused.
"""

import tempfile
import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generator import (
    Job,
    Response,
    closed_loop,
    generate,
    scrape_metrics,
    service_process,
    split_cores,
    summarise,
)
from benchmarks.synthetic import encoder_bundles, write_photographs

TIMES = 10
IMAGES = 16
WARM_UP_S = 1.0
DEADLINE_MS = 5000
SETTLING_S = 1.0  # not counted: the service still estimates its own speed
RECOVERY_S = 2.0


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return the figures for the bundle's own encoder and, without `smoke`, for a ViT-B/32 in int8."""
    generator, service = split_cores()
    with tempfile.TemporaryDirectory() as folder:
        images = write_photographs(Path(folder), IMAGES, 640, 480)
        bundles = encoder_bundles(bundle_path, Path(folder), smoke=smoke)
        encoders = {name: _overload(bundle, images, smoke=smoke) for name, bundle in bundles.items()}
    return {
        "encoders": encoders,
        "times": TIMES,
        "deadline_ms": DEADLINE_MS,
        "image": "JPEG 640x480",
        "cores": {"generator": sorted(generator), "service": sorted(service)},
    }


def _overload(bundle: Path, images: list[str], *, smoke: bool) -> dict[str, Any]:
    generator, service = split_cores()
    peak_s, overload_s, after_s = (3.0, 8.0, 5.0) if smoke else (10.0, 60.0, 10.0)
    flags = ("--device", "cpu", "--cache", "off", "--deadline-ms", str(DEADLINE_MS))
    with service_process(bundle, *flags, cores=service) as (_, url):
        target: dict[str, Any] = {"url": f"{url}/recognize?top_k=5", "images": images, "cores": [*generator]}
        job = Job(**target, connections=8 * len(service), seconds=WARM_UP_S + peak_s)
        peak = closed_loop(job, warm_up_s=WARM_UP_S)["per_s"]
        job = Job(**target, phases=((TIMES * peak, overload_s), (peak / 3, after_s)))
        memory_mib: list[float] = []

        def sample_memory() -> None:
            for _ in range(int(overload_s + after_s)):
                time.sleep(1.0)
                memory_mib.append(round(scrape_metrics(url)["process_resident_memory_bytes"] / 1024**2, 1))

        (run,) = generate([job], during=sample_memory)
    return {"peak_per_s": peak, **summary(run.responses, peak, overload_s, after_s), "memory_mib": memory_mib}


def summary(responses: Sequence[Response], peak: float, overload_s: float, after_s: float) -> dict[str, Any]:
    """Return the figures of `overload_s` seconds of overload and the `after_s` seconds that follow."""
    counted_s = overload_s - SETTLING_S
    during = [each for each in responses if SETTLING_S <= each.at_s < overload_s]
    refused = [each for each in during if each.status == HTTPStatus.TOO_MANY_REQUESTS]
    # Goodput counts what is answered during the overload, even if it was sent before.
    goodput = summarise(responses, warm_up_s=SETTLING_S, seconds=counted_s)
    after = summarise([each for each in responses if each.at_s >= overload_s + RECOVERY_S])
    return {
        "offered_per_s": round(len(during) / counted_s, 1),
        "goodput_per_s": goodput["per_s"],
        "goodput_share": round(goodput["per_s"] / peak, 3),
        "accepted_p99_ms": goodput["p99_ms"],
        "refused_p99_ms": round(float(np.percentile([each.took_ms for each in refused], 99)), 1) if refused else None,
        "statuses": {"200": goodput["answers"], **goodput["failures"]},
        "refused_without_retry_after": sum(not each.retry_after for each in refused),
        "after": {"statuses": {"200": after["answers"], **after["failures"]}, "p99_ms": after["p99_ms"]},
    }
