"""`wikiclip bench service`: what the service adds to decode, encode and search, and what it loses to them when full.

The service (cache off) and a loop that calls the same three functions, with no queue, no threads and no HTTP, take
turns on the same cores, photographs and threads, so that what else the machine does falls on both. Once one request at
a time, once as many as the cores can do; with the bundle's own encoder and, without `--smoke`, with a ViT-B/32 in int8.
Both are started anew for each turn: where a process happens to lie in memory makes more of a difference than what is
measured. One request at a time is asked by a generator that polls, so that its own waking is not counted; what the
service adds for one that sleeps until it is answered stands beside it, as `sleeping_adds_ms`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.closed_loop import Job, run_job
from benchmarks.measure import median_interval
from benchmarks.plain_loop import run_loops
from benchmarks.server import ANSWERED, running_service, scrape_metrics, split_cores, thread_flags
from benchmarks.synthetic import encoder_bundles, write_photographs
from evaluation.pages import Bar, bar_plot, page, section, table
from index.bundle import Bundle

IMAGES = 16
ROUNDS, SECONDS, WARM_UP_S = 8, 2.0, 0.5
SMOKE_ROUNDS, SMOKE_SECONDS, SMOKE_WARM_UP_S = 1, 2.0, 0.5
CONNECTIONS_A_CORE = 8  # enough that the service never waits for the next image
# What is aimed at.
HEAVY_RATIO, TINY_ADDS_MS, SATURATED_SHARE = 1.05, 1.0, 0.95


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """For each encoder the medians over rounds: p50 of loop and service and their difference and ratio (with 95 %
    intervals), images a second of both and the service's share, and the time of the processor that an image takes when
    full."""
    generator, service = split_cores()
    Bundle.open(bundle_path)  # what is wrong with it is said here, not by the service
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = write_photographs(work, IMAGES, 1280, 960)
        bundles = encoder_bundles(bundle_path, work, smoke=smoke)
        encoders = {
            name: _compare(bundle, images, work, generator, service, smoke=smoke) for name, bundle in bundles.items()
        }
    return {
        "encoders": encoders,
        "image": "JPEG 1280x960",
        "threads": len(service),
        "cores": {"generator": sorted(generator), "service": sorted(service)},
        "aimed_at": {
            "heavy_ratio": HEAVY_RATIO, "tiny_adds_ms": TINY_ADDS_MS, "saturated_share": SATURATED_SHARE,
        },
    }  # fmt: skip


def _compare(
    bundle: Path, images: list[str], work: Path, generator: set[int], service: set[int], *, smoke: bool
) -> dict[str, Any]:
    seconds, warm_up_s = (SMOKE_SECONDS, SMOKE_WARM_UP_S) if smoke else (SECONDS, WARM_UP_S)
    flags = ("--cache", "off", "--device", "cpu", *thread_flags(len(service)))
    apart = [{core} for core in sorted(service)]
    rounds: list[dict[str, float]] = []

    def ask(url: str, connections: int, *, polls: bool = False) -> dict[str, Any]:
        job = Job(
            url=f"{url}/recognize?top_k=5", images=images, field=None, connections=connections,
            warm_up_s=warm_up_s, seconds=seconds, polls=polls,
        )  # fmt: skip
        return run_job(job, work, generator)

    for _ in range(SMOKE_ROUNDS if smoke else ROUNDS):
        loop = run_loops(bundle, images, work, [service], warm_up_s=warm_up_s, seconds=seconds)
        with running_service(bundle, *flags, "--log-level", "warning", cores=service) as url:
            alone = ask(url, 1, polls=True)
            asleep = ask(url, 1)
            before = _spent(url)
            full = ask(url, CONNECTIONS_A_CORE * len(service))
            after = _spent(url)
        loops = loop
        if len(apart) > 1:  # a loop on each core has them all busy all the time
            loops = run_loops(bundle, images, work, apart, warm_up_s=warm_up_s, seconds=seconds)
        rounds.append(
            {
                "loop_p50_ms": loop["p50_ms"],
                "service_p50_ms": alone["p50_ms"],
                "adds_ms": alone["p50_ms"] - loop["p50_ms"],
                "ratio": alone["p50_ms"] / loop["p50_ms"],
                "sleeping_adds_ms": asleep["p50_ms"] - loop["p50_ms"],
                "decode_ms": loop["decode_ms"],
                "encode_ms": loop["encode_ms"],
                "search_ms": loop["search_ms"],
                "loop_per_s": loops["per_s"],
                "service_per_s": full["per_s"],
                "share": full["per_s"] / loops["per_s"],
                "loop_cpu_ms": loops["cpu_ms"],
                "service_cpu_ms": 1000 * (after[0] - before[0]) / (after[1] - before[1]),
                "service_p99_ms": full["p99_ms"],
                "failures": sum(sum(each["failures"].values()) for each in (alone, asleep, full)),
            }
        )
    samples = {key: [each[key] for each in rounds] for key in rounds[0]}
    medians = {key: round(float(np.median(values)), 3) for key, values in samples.items()}
    return medians | {
        f"{key}_interval": [round(end, 3) for end in median_interval(samples[key])] for key in ("adds_ms", "ratio")
    }


def _spent(url: str) -> tuple[float, float]:
    """Seconds of the processor that the service has used, and images that it has answered."""
    told = scrape_metrics(url)
    return told["process_cpu_seconds_total"], told.get(ANSWERED, 0)


def report(figures: dict[str, Any]) -> str:
    """An HTML page: p50 and images a second of loop and service, by encoder."""
    encoders = figures["encoders"]
    plots = [
        bar_plot(
            [
                Bar(name=f"{name}, {kind}", value=each[f"{kind}_{key}"])
                for name, each in encoders.items()
                for kind in ("loop", "service")
            ],
            title=title,
            x_label=label,
        )
        for key, title, label in (
            ("p50_ms", "One request at a time, less is better", "p50, ms"),
            ("per_s", "As many as it can do, more is better", "images/s"),
        )
    ]
    keys = list(next(iter(encoders.values())))
    rows = [[key, *(str(each[key]) for each in encoders.values())] for key in keys]
    said = (
        f"<p>{figures['image']}, cache off, {figures['threads']} thread(s). Aimed at: p50 at most {HEAVY_RATIO} times "
        f"the loop's with the large encoder, at most {TINY_ADDS_MS} ms above it with the tiny one; "
        f"{SATURATED_SHARE:.0%} of the loop's images a second.</p>"
    )
    return page(
        "The service against its parts", section("Loop and service", said, *plots, table(("", *encoders), rows))
    )
