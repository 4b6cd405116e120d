"""`wikiclip bench stages`: decode, encode, search, end to end, the cache, and growth with the size of the catalog.

All are timed in turns (`benchmarks.rounds`), each round all of them, so that they share whatever else the machine does.
One thread each but for the service, which has its own; catalogs of made-up embeddings grow as far as memory allows.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.measure import Probe, nested, sample
from benchmarks.server import running_service
from benchmarks.synthetic import bust_cache, photograph
from core.runtime import faiss
from evaluation.pages import Bar, Series, bar_plot, line_plot, page, section, table
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from index.candidates import CpuCandidates
from index.factory import factory_index
from service.loaded_bundle import open_encoder
from service.settings import Settings

Float32Array = npt.NDArray[np.float32]

MAX_PIXELS = 64_000_000
IMAGES = ((640, 480), (1280, 960), (4000, 3000))
BATCH = 8
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SMOKE_SIZES = (1_000, 10_000)
DIM = 512
EXACT = "SQfp16"
FAST = "PQ128x4fs"
K_FACTOR = 50  # candidates looked at again in float16, as a multiple of what is asked for
_CHUNK = 50_000
_QUERIES = 256
_TOP = 10
_SHARE_OF_MEMORY = 0.2
ROUNDS, SMOKE_ROUNDS = 12, 2
MOMENT_S, SMOKE_MOMENT_S = 0.25, 0.05


def measure(bundle_path: Path, *, smoke: bool, minutes: float | None = None) -> dict[str, object]:
    """Milliseconds of each stage with all samples, and the recall of the fast index at each size. Without a smoke run,
    at least two rounds and as many more, up to twelve, as `minutes` allow."""
    until = None if minutes is None else time.monotonic() + 60 * minutes
    bundle = Bundle.open(bundle_path)
    catalogs = _catalogs(SMOKE_SIZES if smoke else SIZES)
    with ExitStack() as stack:
        probes = [*_in_process(bundle), *_growth(catalogs), *_over_http(bundle_path, stack)]
        faiss.omp_set_num_threads(1)
        metrics = sample(
            probes,
            rounds=SMOKE_ROUNDS if smoke else ROUNDS,
            moment_s=SMOKE_MOMENT_S if smoke else MOMENT_S,
            until=until,
        )
    return {
        **nested(metrics),
        "catalogs": [
            {
                "entities": each.size, "width": DIM, "exact": EXACT, "exact_mb": each.exact_mb,
                "fast": f"{FAST}, refined in {EXACT}, k_factor {K_FACTOR}", "fast_mb": each.fast_mb,
                "fast_recall_at_10": each.recall,
            }
            for each in catalogs
        ],
        "threads": {"in process": 1, "service": "its default"},
    }  # fmt: skip


def _in_process(bundle: Bundle) -> Iterator[Probe]:
    """Decode at three sizes, encode one and eight, search the bundle, and the three of them together."""
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=1))
    index = bundle.index()
    for width, height in IMAGES:
        data = photograph(1, width, height)
        decode = partial(load_pixels, data, preprocessing, max_pixels=MAX_PIXELS)
        yield Probe(name=f"decode/JPEG {width}x{height}", call=_whichever(decode))
    images = [photograph(seed) for seed in range(BATCH)]
    pixels = np.stack([load_pixels(data, preprocessing, max_pixels=MAX_PIXELS) for data in images])
    yield Probe(name="encode/1 image", call=lambda i: encoder.encode(pixels[i % BATCH][None]))
    yield Probe(name=f"encode/{BATCH} images, each", call=lambda _: encoder.encode(pixels), items=BATCH)
    queries = encoder.encode(pixels)
    yield Probe(name="search/1 query", call=lambda i: index.search(queries[i % BATCH][None], _TOP))
    many = np.repeat(queries, 8, axis=0)
    yield Probe(name=f"search/{len(many)} queries, each", call=lambda _: index.search(many, _TOP), items=len(many))

    def end_to_end(i: int) -> object:
        found = load_pixels(images[i % BATCH], preprocessing, max_pixels=MAX_PIXELS)
        return index.search(encoder.encode(found[None]), _TOP)

    yield Probe(name="end to end/in process", call=end_to_end)


def _over_http(bundle_path: Path, stack: ExitStack) -> Iterator[Probe]:
    """An image never seen before, and one that is in the cache, from a service that is started for it."""
    url = stack.enter_context(running_service(bundle_path, "--cache", "on", "--log-level", "warning"))
    client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
    images = [photograph(seed) for seed in range(BATCH)]
    number = itertools.count()

    def ask(data: bytes) -> None:
        client.post("/recognize", content=data, headers={"Content-Type": "image/jpeg"}).raise_for_status()

    yield Probe(
        name="end to end/over HTTP, not cached", call=lambda i: ask(bust_cache(images[i % BATCH], next(number)))
    )
    yield Probe(name="end to end/over HTTP, cached", call=lambda _: ask(images[0]))


@dataclass(frozen=True, kw_only=True)
class _Catalog:
    """An exact and a fast index over as many made-up embeddings, queries near some of them, and how they agree."""

    size: int
    exact: CpuCandidates
    fast: CpuCandidates
    queries_QD: Float32Array
    recall: float
    exact_mb: float
    fast_mb: float


def _catalogs(sizes: Sequence[int]) -> list[_Catalog]:
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    largest = _SHARE_OF_MEMORY * memory / (2 * DIM)  # both indexes share the float16 vectors
    return [_catalog(size) for size in sizes if size <= max(largest, sizes[0])]


def _catalog(size: int) -> _Catalog:
    """Clusters of embeddings, as a catalog has them: nearest neighbours among random directions would be chance."""
    rng = np.random.default_rng(size)
    centres = rng.standard_normal((max(8, size // 100), DIM), dtype=np.float32)
    exact, fast = factory_index(DIM, EXACT), factory_index(DIM, FAST)
    queries = np.empty((0, DIM), np.float32)
    for start in range(0, size, _CHUNK):
        count = min(_CHUNK, size - start)
        vectors = centres[rng.integers(len(centres), size=count)]
        vectors = _unit(vectors + 0.7 * rng.standard_normal((count, DIM), dtype=np.float32))
        if start == 0:
            queries = _unit(
                vectors[:_QUERIES] + (0.5 / DIM**0.5) * rng.standard_normal(vectors[:_QUERIES].shape, dtype=np.float32)
            )
            exact.train(vectors)
            fast.train(vectors)
        exact.add(vectors)
        fast.add(vectors)
    refined = faiss.IndexRefine(fast, exact)
    exactly, fastly = CpuCandidates(exact), CpuCandidates(refined)
    wanted = exactly.search(queries, _TOP, {}, None, 1.0)[1]
    found = fastly.search(queries, _TOP, {"k_factor": K_FACTOR}, None, 1.0)[1]
    recall = np.mean([len(set(w) & set(f)) / _TOP for w, f in zip(wanted.tolist(), found.tolist(), strict=True)])
    return _Catalog(
        size=size, exact=exactly, fast=fastly, queries_QD=queries, recall=round(float(recall), 4),
        exact_mb=round(2e-6 * DIM * size, 1), fast_mb=round((2 * DIM + 64) * 1e-6 * size, 1),
    )  # fmt: skip


def _unit(vectors_ND: Float32Array) -> Float32Array:
    unit: Float32Array = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return unit


def _whichever(call: Callable[[], object]) -> Callable[[int], object]:
    """A probe's call that does the same whatever its number."""
    return lambda _: call()


def _growth(catalogs: Sequence[_Catalog]) -> Iterator[Probe]:
    """One query against each catalog, exactly and fast."""

    def ask(candidates: CpuCandidates, queries_QD: Float32Array, parameters: dict[str, Any], i: int) -> object:
        return candidates.search(queries_QD[i % len(queries_QD)][None], _TOP, parameters, None, 1.0)

    for each in catalogs:
        yield Probe(name=f"growth/{each.size} exact", call=partial(ask, each.exact, each.queries_QD, {}))
        parameters = {"k_factor": K_FACTOR}
        yield Probe(name=f"growth/{each.size} fast", call=partial(ask, each.fast, each.queries_QD, parameters))


def report(figures: dict[str, Any]) -> str:
    """An HTML page: the time of each stage, and how search grows with the catalog."""
    bars = [
        Bar(name=f"{group}, {name}", value=metric["median"], interval=tuple(metric["interval"]))
        for group in ("decode", "encode", "search", "end to end")
        for name, metric in figures[group].items()
    ]
    rows = [
        [f"{group}, {name}", f"{metric['median']:.3g}", "{:.3g} to {:.3g}".format(*metric["interval"])]
        for group in ("decode", "encode", "search", "end to end", "growth")
        for name, metric in figures[group].items()
    ]
    series = []
    for kind in ("exact", "fast"):
        points = [(each["entities"], figures["growth"][f"{each['entities']} {kind}"]) for each in figures["catalogs"]]
        series.append(
            Series(
                name=f"{kind}: {figures['catalogs'][0][kind]}",
                points=[(size, metric["median"]) for size, metric in points],
                intervals=[tuple(metric["interval"]) for _, metric in points],
            )
        )
    growth = line_plot(
        series, title="Search against the size of the catalog", x_label=f"entities of width {DIM}",
        y_label="ms a query",
        x_log=True, y_log=True,
    )  # fmt: skip
    sizes = [
        [f"{each['entities']:,}".replace(",", " "), f"{each['exact_mb']}", f"{each['fast_mb']}",
         f"{each['fast_recall_at_10']:.4f}"]
        for each in figures["catalogs"]
    ]  # fmt: skip
    hot, cold = (figures["end to end"][f"over HTTP, {kind}"]["median"] for kind in ("cached", "not cached"))
    told = (
        f"Medians with 95 % intervals, one thread. An answer from the cache takes {hot:.2f} ms over HTTP, one that has "
        f"to be found {cold:.1f} ms."
    )
    return page(
        "Stages",
        "\n".join(
            (
                section("Where the time goes", f"<p>{told}</p>", bar_plot(bars, title="Time by stage", x_label="ms")),
                section(
                    "Growth with the catalog",
                    growth,
                    table(["entities", "exact, MB", "fast, MB", "fast, recall@10"], sizes),
                ),
                section("Every figure", table(["stage", "median, ms", "95 % interval"], rows)),
            )
        ),
    )
