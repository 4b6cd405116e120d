"""Decode, encode and search in a loop: what the service does for an image, with no queue, no threads and no HTTP.

`python -m benchmarks.plain_loop JOB.json` prints figures as JSON, from a process of its own, as the service is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

TOP_K = 5  # asked for; a calibrated bundle is searched for as many as its confidence is made of
MAX_PIXELS = 64_000_000


def run_loops(
    bundle: Path, images: list[str], work: Path, cores: list[set[int]], *, warm_up_s: float, seconds: float
) -> dict[str, float]:
    """A loop on each set of cores at the same time, with as many threads as it has cores: images a second of all of
    them, and the medians of the first in ms."""
    with ExitStack() as stack:
        started = []
        for number, own in enumerate(cores):
            path = work / f"loop{number}.json"
            job = {"bundle": str(bundle), "images": images, "threads": len(own), "warm_up_s": warm_up_s}
            path.write_text(json.dumps({**job, "seconds": seconds}), encoding="utf-8")
            command = [sys.executable, "-m", "benchmarks.plain_loop", str(path)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
            )
            stack.enter_context(process)
            os.sched_setaffinity(process.pid, own)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it is loaded
        for process in started:
            assert process.stdin is not None
            process.stdin.close()  # and may begin
        said = [process.stdout.read() for process in started if process.stdout is not None]
    figures = [json.loads(each) for each in said]
    return {**figures[0], "per_s": round(sum(each["per_s"] for each in figures), 2)}


def main() -> None:
    """What the process does."""
    from core.runtime import faiss
    from imaging import Preprocessing, load_pixels
    from index.bundle import Bundle
    from index.calibration import CANDIDATES
    from service.loaded_bundle import open_encoder
    from service.settings import Settings

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_bytes())
    images = [Path(path).read_bytes() for path in job["images"]]
    bundle = Bundle.open(Path(job["bundle"]))
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=job["threads"]))
    index = bundle.index()
    faiss.omp_set_num_threads(job["threads"])
    top_k = TOP_K if bundle.calibration is None else max(TOP_K, CANDIDATES)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    counts_from = time.perf_counter() + job["warm_up_s"]
    ends = counts_from + job["seconds"]
    taken: list[tuple[float, float, float]] = []
    cpu_started = time.process_time()
    number = 0
    while (started := time.perf_counter()) < ends:
        pixels_HW3 = load_pixels(images[number % len(images)], preprocessing, max_pixels=MAX_PIXELS)
        decoded = time.perf_counter()
        embedding_1D = encoder.encode(pixels_HW3[None])
        encoded = time.perf_counter()
        index.search(embedding_1D, top_k)
        if counts_from <= (searched := time.perf_counter()) < ends:
            taken.append((decoded - started, encoded - decoded, searched - encoded))
        number += 1
    cpu_ms = 1000 * (time.process_time() - cpu_started) / number
    stages_ms = 1000 * np.array(taken)
    decode_ms, encode_ms, search_ms = np.median(stages_ms, axis=0).round(3).tolist()
    figures = {
        "per_s": round(len(taken) / job["seconds"], 2),
        "p50_ms": round(float(np.median(stages_ms.sum(axis=1))), 3),
        "cpu_ms": round(cpu_ms, 3),
        "decode_ms": decode_ms,
        "encode_ms": encode_ms,
        "search_ms": search_ms,
    }
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main()
