"""`wikiclip bench service`: what HTTP, queueing and threads add to decoding, encoding and searching.

The service (cache off) and a plain loop over the same three functions take turns on the same cores, images and threads,
with one request at a time and at saturation. Both are restarted in every round, because where a process happens to be
in memory changes more than what is measured here. The generator polls, so its own waking up does not count as latency.
Its event loop adds about 0.06 ms, which counts as the service's.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generator import (
    ANSWERED,
    Job,
    closed_loop,
    run_on_cores,
    scrape_metrics,
    service_process,
    split_cores,
)
from benchmarks.measure import median_interval
from benchmarks.synthetic import encoder_bundles, write_photographs
from core.runtime import faiss
from evaluation.pages import Bars, Report
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from index.calibration import CANDIDATES
from service.encoder import open_encoder
from service.settings import Settings

IMAGES = 16
TOP_K = 5
WARM_UP_S = 0.5
CONNECTIONS_PER_CORE = 8  # enough that the service always has a next image
REPORT = Report(
    title="The service against its parts",
    plots=(
        Bars(
            title="One request at a time, less is better", label="p50, ms",
            values=("encoders/*/loop_p50_ms", "encoders/*/service_p50_ms"),
        ),
        Bars(
            title="At saturation, more is better", label="images/s",
            values=("encoders/*/loop_per_s", "encoders/*/service_per_s"),
        ),
    ),
)  # fmt: skip


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return medians over rounds for the bundle's own encoder and, without `smoke`, for a ViT-B/32 in int8."""
    generator, service = split_cores()
    Bundle.open(bundle_path)  # raises before a service is started
    with tempfile.TemporaryDirectory() as folder:
        images = write_photographs(Path(folder), IMAGES, 1280, 960)
        bundles = encoder_bundles(bundle_path, Path(folder), smoke=smoke)
        rounds, seconds = (1, 0.5) if smoke else (8, 2.0)
        encoders = {name: _compare(bundle, images, rounds, seconds) for name, bundle in bundles.items()}
    return {
        "encoders": encoders,
        "image": "JPEG 1280x960",
        "cores": {"generator": sorted(generator), "service": sorted(service)},
    }


def _compare(bundle: Path, images: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    generator, cores = split_cores()

    def request(url: str, connections: int) -> dict[str, Any]:
        job = Job(
            url=f"{url}/recognize?top_k={TOP_K}", images=images, cores=[*generator], connections=connections,
            seconds=WARM_UP_S + seconds, poll=connections == 1,
        )  # fmt: skip
        return closed_loop(job, warm_up_s=WARM_UP_S)

    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        loop = _run_loops(bundle, images, [cores], seconds)
        with service_process(bundle, "--cache", "off", "--device", "cpu", cores=cores) as (_, url):
            single = request(url, 1)
            before = scrape_metrics(url)
            full = request(url, CONNECTIONS_PER_CORE * len(cores))
            after = scrape_metrics(url)
        # One loop per core keeps all cores busy.
        loops = loop if len(cores) == 1 else _run_loops(bundle, images, [{core} for core in sorted(cores)], seconds)
        cpu_s, answered = (after[name] - before.get(name, 0) for name in ("process_cpu_seconds_total", ANSWERED))
        figures = {
            "loop_p50_ms": loop["p50_ms"],
            "service_p50_ms": single["p50_ms"],
            "adds_ms": single["p50_ms"] - loop["p50_ms"],
            "ratio": single["p50_ms"] / loop["p50_ms"],
            **{key: loop[key] for key in ("decode_ms", "encode_ms", "search_ms")},
            "loop_per_s": loops["per_s"],
            "service_per_s": full["per_s"],
            "share": full["per_s"] / loops["per_s"],
            "loop_cpu_ms": loops["cpu_ms"],
            "service_cpu_ms": 1000 * cpu_s / answered,
            "service_p99_ms": full["p99_ms"],
            "failures": sum(sum(each["failures"].values()) for each in (single, full)),
        }
        for key, value in figures.items():
            samples.setdefault(key, []).append(value)
    medians = {key: round(float(np.median(values)), 3) for key, values in samples.items()}
    return medians | {
        f"{key}_interval": [round(bound, 3) for bound in median_interval(samples[key])] for key in ("adds_ms", "ratio")
    }


def _run_loops(bundle: Path, images: list[str], cores: list[set[int]], seconds: float) -> dict[str, float]:
    """Run a plain loop on each set of cores at the same time, with one thread per core.

    Return the images per second of all loops, and the medians of the first in ms.
    """
    figures = run_on_cores([(partial(_loop, bundle, images, len(each), seconds), each) for each in cores])
    return {**figures[0], "per_s": round(sum(each["per_s"] for each in figures), 2)}


def _loop(bundle_path: Path, images: list[str], threads: int, seconds: float) -> dict[str, float]:
    """Decode, encode and search in turn, and return the figures."""
    contents = [Path(path).read_bytes() for path in images]
    bundle = Bundle.open(bundle_path)
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=threads))
    index = bundle.index()
    faiss.omp_set_num_threads(threads)
    top_k = TOP_K if bundle.calibration is None else max(TOP_K, CANDIDATES)  # as the service searches
    counted_from = time.perf_counter() + WARM_UP_S
    end = counted_from + seconds
    times: list[tuple[float, float, float, float]] = []
    cpu_started = time.process_time()
    while (started := time.perf_counter()) < end:
        pixels_HW3 = load_pixels(contents[len(times) % len(contents)], preprocessing)
        decoded = time.perf_counter()
        embedding_1D = encoder.encode(pixels_HW3[None])
        encoded = time.perf_counter()
        index.search(embedding_1D, top_k)
        times.append((started, decoded, encoded, time.perf_counter()))
    cpu_ms = 1000 * (time.process_time() - cpu_started) / len(times)
    stages_ms = 1000 * np.diff([each for each in times if counted_from <= each[-1] < end])
    decode_ms, encode_ms, search_ms = np.median(stages_ms, axis=0).round(3).tolist()
    return {
        "per_s": round(len(stages_ms) / seconds, 2),
        "p50_ms": round(float(np.median(stages_ms.sum(axis=1))), 3),
        "cpu_ms": round(cpu_ms, 3),
        "decode_ms": decode_ms,
        "encode_ms": encode_ms,
        "search_ms": search_ms,
    }
