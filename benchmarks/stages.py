"""`wikiclip bench stages`: decode, encode, search, end to end, and the cache.

Every round times every stage (`benchmarks.measure.sample`), so other work on the machine affects all of them alike. All
run on one thread, except for the service.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.generator import service_process
from benchmarks.measure import Probe, nested, sample
from benchmarks.synthetic import bust_cache, photograph
from core.runtime import faiss
from evaluation.pages import Bars, Report
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.encoder import open_encoder
from service.settings import Settings

IMAGE_SIZES = ((640, 480), (1280, 960), (4000, 3000))
BATCH = 8
TOP_K = 10

REPORT = Report(
    title="Stages",
    plots=(Bars(title="Time by stage", label="ms", values=("decode/*", "encode/*", "search/*", "end to end/*")),),
)


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return milliseconds of each stage with all samples."""
    rounds, moment_s = (2, 0.05) if smoke else (12, 0.25)
    with ExitStack() as stack:
        probes = [*_in_process(Bundle.open(bundle_path)), *_over_http(bundle_path, stack)]
        faiss.omp_set_num_threads(1)
        metrics = sample(probes, rounds=rounds, moment_s=moment_s)
    return {**nested(metrics), "threads": {"in process": 1, "service": "its default"}}


def _in_process(bundle: Bundle) -> Iterator[Probe]:
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=1))
    index = bundle.index()

    def decode(data: bytes, _: int = 0) -> Any:
        return load_pixels(data, preprocessing)

    for width, height in IMAGE_SIZES:
        yield Probe(name=f"decode/JPEG {width}x{height}", call=partial(decode, photograph(1, width, height)))
    images = [photograph(seed) for seed in range(BATCH)]
    pixels = np.stack([decode(data) for data in images])
    yield Probe(name="encode/1 image", call=lambda i: encoder.encode(pixels[i % BATCH][None]))
    yield Probe(name=f"encode/{BATCH} images, each", call=lambda _: encoder.encode(pixels), items=BATCH)
    queries = np.asarray(encoder.encode(pixels))
    yield Probe(name="search/1 query", call=lambda i: index.search(queries[i % BATCH][None], TOP_K))
    many = np.repeat(queries, 8, axis=0)
    yield Probe(name=f"search/{len(many)} queries, each", call=lambda _: index.search(many, TOP_K), items=len(many))
    yield Probe(
        name="end to end/in process",
        call=lambda i: index.search(encoder.encode(decode(images[i % BATCH])[None]), TOP_K),
    )


def _over_http(bundle_path: Path, stack: ExitStack) -> Iterator[Probe]:
    """Yield probes of a service: images that it has never seen, and one that is in its cache."""
    _, url = stack.enter_context(service_process(bundle_path, "--cache", "on"))
    client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
    images = [photograph(seed) for seed in range(BATCH)]
    numbers = itertools.count()

    def recognize(data: bytes) -> None:
        client.post("/recognize", content=data, headers={"Content-Type": "image/jpeg"}).raise_for_status()

    yield Probe(
        name="end to end/over HTTP, not cached",
        call=lambda i: recognize(bust_cache(images[i % BATCH], next(numbers))),
    )
    yield Probe(name="end to end/over HTTP, cached", call=lambda _: recognize(images[0]))
