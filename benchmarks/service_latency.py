"""`wikiclip bench service`: what HTTP adds to decode, encode and search, at concurrency 1 and with the cache off.

Both sides run in one process tree on the same images with the same thread counts; the loop calls the same three
functions that the service calls, with no queue, no threads and no HTTP around them.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import httpx

from benchmarks.photographs import photograph
from benchmarks.server import running_service
from benchmarks.timing import percentiles_ms
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.generation import open_encoder
from service.settings import Settings

THREADS = 1


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """p50, p90 and p99 of the plain loop and of `POST /recognize`, one after the other; the difference of their p50."""
    repeats = 100 if smoke else 1000
    images = [photograph(seed) for seed in range(32)]
    loop = _loop(bundle_path, images, repeats)
    service = _service(bundle_path, images, repeats)
    return {
        "image": "JPEG 640x480",
        "threads": THREADS,
        "loop": loop,
        "service": service,
        "http_adds_p50_ms": round(service["p50_ms"] - loop["p50_ms"], 3),
    }


def _loop(bundle_path: Path, images: list[bytes], repeats: int) -> dict[str, float]:
    bundle = Bundle.open(bundle_path)
    index = bundle.index()
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=THREADS))
    faiss.omp_set_num_threads(THREADS)

    def recognise(i: int) -> object:
        pixels = load_pixels(images[i % len(images)], preprocessing, max_pixels=64_000_000)
        return index.search(encoder.encode(pixels[None]), 5)

    return percentiles_ms(recognise, repeats=repeats, warm_up=20)


def _service(bundle_path: Path, images: list[bytes], repeats: int) -> dict[str, float]:
    flags = ("--cache", "off", "--device", "cpu", "--threads", str(THREADS), "--log-level", "warning")
    with running_service(bundle_path, *flags) as url, httpx.Client(base_url=url) as client:

        def recognise(i: int) -> None:
            headers = {"Content-Type": "image/jpeg"}
            client.post("/recognize", content=images[i % len(images)], headers=headers).raise_for_status()

        return percentiles_ms(recognise, repeats=repeats, warm_up=20)
