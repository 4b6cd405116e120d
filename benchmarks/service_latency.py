"""`wikiclip bench service`: what HTTP adds to decode, encode and search, at concurrency 1 and with the cache off.

Both sides run in one process tree on the same images with the same thread counts; the loop calls the same three
functions that the service calls, with no queue, no threads and no HTTP around them.
"""

from __future__ import annotations

import io
from pathlib import Path

import faiss
import httpx
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.server import running_service
from benchmarks.timing import percentiles_ms
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.encoder import OnnxEncoder

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


def photograph(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with the frequencies of a photograph: smooth areas, edges, some grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(coarse)
    for _ in range(20):
        x, y, r = (int(random.integers(low, high)) for low, high in ((0, width), (0, height), (10, 90)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = np.asarray(coarse, np.int16) + random.normal(0, 6, (height, width, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _loop(bundle_path: Path, images: list[bytes], repeats: int) -> dict[str, float]:
    bundle = Bundle.open(bundle_path)
    index, entry = bundle.index(), bundle.manifest.image_encoder
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = OnnxEncoder(
        bundle.image_encoder_path, preprocessing, input_name=entry.input, embedding_name=entry.outputs[1],
        embedding_dim=bundle.manifest.embedding_dim, device="cpu", threads=THREADS,
    )  # fmt: skip
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
