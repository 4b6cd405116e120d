"""`wikiclip bench stages`: decode, encode, search, end to end, the cache, and growth with the size of the catalog.

Every round times every stage (`benchmarks.measure.sample`), so other work on the machine affects all of them alike. All
run on one thread, except for the service. Synthetic catalogs grow as far as memory allows.

Shapes: Q queries, D embedding width.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.generator import running_service
from benchmarks.measure import Probe, nested, sample
from benchmarks.synthetic import Population, bust_cache, photograph
from core.runtime import faiss
from evaluation.pages import Bars, Lines, Report
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.encoder import open_encoder
from service.settings import Settings

MAX_PIXELS = 64_000_000
IMAGE_SIZES = ((640, 480), (1280, 960), (4000, 3000))
BATCH = 8
TOP_K = 10
ROUNDS, SMOKE_ROUNDS = 12, 2
MOMENT_S, SMOKE_MOMENT_S = 0.25, 0.05

CATALOG_SIZES = (1_000, 10_000, 100_000, 1_000_000)
SMOKE_CATALOG_SIZES = (1_000, 10_000)
DIM = 512
EXACT, FAST = "SQfp16", "PQ128x4fs"
K_FACTOR = 50  # the fast index ranks this many times TOP_K candidates by their float16 vectors
QUERIES = 256
MEMORY_SHARE = 0.2
CHUNK = 50_000
REPORT = Report(
    title="Stages",
    plots=(
        Bars(title="Time by stage", label="ms", values=("decode/*", "encode/*", "search/*", "end to end/*")),
        Lines(
            title="Search against the size of the catalog", x_label=f"entities of width {DIM}", y_label="ms per query",
            points=("growth/*/*",), y=("",), x_log=True, y_log=True,
        ),
    ),
)  # fmt: skip


def measure(bundle_path: Path, *, smoke: bool, minutes: float | None = None) -> dict[str, object]:
    """Return milliseconds of each stage with all samples, and the recall of the fast index at each size.

    Without `smoke`, run two to twelve rounds, as many as `minutes` allow.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = MEMORY_SHARE * memory / (2 * DIM)  # both indexes share the float16 vectors
    sizes = SMOKE_CATALOG_SIZES if smoke else CATALOG_SIZES
    probes = [*_in_process(Bundle.open(bundle_path))]
    catalogs = []
    for size in sizes:
        if size <= max(largest, sizes[0]):
            growth, catalog = _growth(size)
            probes += growth
            catalogs.append(catalog)
    with ExitStack() as stack:
        probes += _over_http(bundle_path, stack)
        faiss.omp_set_num_threads(1)
        rounds, moment_s = (SMOKE_ROUNDS, SMOKE_MOMENT_S) if smoke else (ROUNDS, MOMENT_S)
        metrics = sample(probes, rounds=rounds, moment_s=moment_s, until=until)
    return {**nested(metrics), "catalogs": catalogs, "threads": {"in process": 1, "service": "its default"}}


def _in_process(bundle: Bundle) -> Iterator[Probe]:
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=1))
    index = bundle.index()

    def decode(data: bytes, _: int = 0) -> Any:
        return load_pixels(data, preprocessing, max_pixels=MAX_PIXELS)

    for width, height in IMAGE_SIZES:
        yield Probe(name=f"decode/JPEG {width}x{height}", call=partial(decode, photograph(1, width, height)))
    images = [photograph(seed) for seed in range(BATCH)]
    pixels = np.stack([decode(data) for data in images])
    yield Probe(name="encode/1 image", call=lambda i: encoder.encode(pixels[i % BATCH][None]))
    yield Probe(name=f"encode/{BATCH} images, each", call=lambda _: encoder.encode(pixels), items=BATCH)
    queries = encoder.encode(pixels)
    yield Probe(name="search/1 query", call=lambda i: index.search(queries[i % BATCH][None], TOP_K))
    many = np.repeat(queries, 8, axis=0)
    yield Probe(name=f"search/{len(many)} queries, each", call=lambda _: index.search(many, TOP_K), items=len(many))
    yield Probe(
        name="end to end/in process",
        call=lambda i: index.search(encoder.encode(decode(images[i % BATCH])[None]), TOP_K),
    )


def _over_http(bundle_path: Path, stack: ExitStack) -> Iterator[Probe]:
    """Yield probes of a service: images that it has never seen, and one that is in its cache."""
    url = stack.enter_context(running_service(bundle_path, "--cache", "on"))
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


def _growth(size: int) -> tuple[list[Probe], dict[str, Any]]:
    """Return probes of two indexes over so many synthetic embeddings, and the size and recall of the indexes."""
    rng = np.random.default_rng(size)
    population = Population.of(DIM)
    exact, codes = (faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT) for factory in (EXACT, FAST))
    for start in range(0, size, CHUNK):
        vectors_ND = population.draw(min(CHUNK, size - start), rng)
        if start == 0:
            near_QD = vectors_ND[:QUERIES]
            queries_QD = near_QD + rng.normal(0, 0.5 / DIM**0.5, near_QD.shape).astype(np.float32)
            queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
            exact.train(vectors_ND)
            codes.train(vectors_ND)
        exact.add(vectors_ND)
        codes.add(vectors_ND)
    fast = faiss.IndexRefine(codes, exact)
    fast.k_factor = K_FACTOR
    (_, expected), (_, found) = (each.search(queries_QD, TOP_K) for each in (exact, fast))
    recall = np.mean([len(np.intersect1d(*pair)) / TOP_K for pair in zip(expected, found, strict=True)])

    def search(index: faiss.Index, i: int) -> Any:
        return index.search(queries_QD[i % QUERIES][None], TOP_K)

    probes = [
        Probe(name=f"growth/{kind}/{size}", call=partial(search, index))
        for kind, index in (("exact", exact), ("fast", fast))
    ]
    return probes, {
        "entities": size, "width": DIM, "exact": EXACT, "exact_mb": round(2e-6 * DIM * size, 1),
        "fast": f"{FAST}, refined in {EXACT}, k_factor {K_FACTOR}", "fast_mb": round((2 * DIM + 64) * 1e-6 * size, 1),
        "fast_recall_at_10": round(float(recall), 4),
    }  # fmt: skip
