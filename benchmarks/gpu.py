"""The service on a GPU at saturation, compared with the encoder alone in a loop, and what limits it.

`python -m benchmarks.gpu prepare --folder F` writes a bundle of 6,063,945 synthetic entities with a ViT-L that computes
in float16. It needs no GPU. `measure --folder F` measures the bundle on a GPU. `search --bandwidth-gb-s N` compares
exact search alone with the time that reading the vectors takes. Several services on one GPU each have their own copy of
encoder and index, and a share of the cores.

Shapes: B batch, Q queries, D embedding width.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.generator import (
    ANSWERED,
    Job,
    generate,
    scrape_metrics,
    service_process,
    split_cores,
    summarise,
)
from benchmarks.measure import gpu_figures, gpu_name, percentiles_ms, sample_gpu
from benchmarks.synthetic import Float32Array, Population, write_embeddings, write_photographs, write_vit_bundle
from core.cli import run
from core.errors import UserError
from core.files import atomic_write_bytes
from core.runtime import describe_run, faiss
from imaging import Preprocessing, normalise
from index.bundle import Bundle
from index.embeddings import EmbeddingShards
from index.gpu import placement
from index.manifest import EMBEDDINGS_FOLDER, MANIFEST_FILE
from index.search import DEFAULT_K_FACTOR
from service.encoder import open_encoder, open_session
from service.settings import Settings

BASE = Path(__file__).parents[1] / "demo" / "bundle"
IMAGE_SIZES = ((640, 480), (1280, 960))
IMAGES = 16
TOP_K = 5
WARM_UP_S = 2.0
GENERATOR_CORES = 4
BATCHES = (1, 8, 32, 64)
SERVICE_BATCH = 32  # the service's default maximum
QUERIES = 512
STAGES = ("decode", "queue", "encode", "search")
FULL = 0.9  # a part that is busy for this share of the time limits the service

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The options that the parts of a measurement share."""

    bundle: Path
    device: str
    seconds: float
    largest_batch: int
    generator_cores: list[int]
    service_cores: list[int]
    connections: int

    @property
    def batches(self) -> list[int]:
        return [batch for batch in BATCHES if batch <= self.largest_batch]

    @property
    def service_batch(self) -> int:
        return max(batch for batch in self.batches if batch <= SERVICE_BATCH)


@click.group()
def main() -> None:
    """Measure the service on a GPU, and what limits it."""


@main.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Folder for the bundle.")
@click.option("--entities", default=6_063_945, help="Entities, with one embedding each.")
@click.option("--encoder", default="vit-l14", help="Encoder, of benchmarks/generative/models.py.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="For `measure`.")
def prepare(folder: Path, entities: int, encoder: str, device: str) -> None:
    """Write the bundle, unless it exists."""
    if (folder / MANIFEST_FILE).exists():
        click.echo(f"{folder} exists", err=True)
        return
    if folder.exists():
        raise UserError(f"{folder} exists and is incomplete; remove it")
    write_vit_bundle(folder, Bundle.open(BASE), encoder, entities, search_device=device)


@main.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="The bundle of `prepare`.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--seconds", default=8.0, help="Length of each measurement.")
@click.option("--processes", default="1,2,4", help="Numbers of services, one run each.")
@click.option("--connections", default=192, help="Connections of all load generators together.")
@click.option("--largest-batch", default=BATCHES[-1], help="Largest batch of the encoder alone.")
@click.option("--out", type=click.Path(path_type=Path), help="File that is also written after each phase.")
def measure(folder: Path, processes: str, out: Path | None, **options: Any) -> None:
    """Measure, and print JSON. If a phase fails, its error replaces its figures, and the exit code is 1."""
    bundle = Bundle.open(folder)
    generator, service = (sorted(cores) for cores in split_cores(GENERATOR_CORES))
    setup = Setup(bundle=folder, generator_cores=generator, service_cores=service, **options)
    settings = {
        **options, "bundle": bundle.name, "entities": bundle.manifest.counts.entities,
        "generator_cores": len(generator), "service_cores": len(service),
    }  # fmt: skip
    figures: Figures = {}
    outcome = {**describe_run(settings), "gpu": gpu_name(), "figures": figures}
    failed = False

    def phase(name: str, measure_phase: Callable[[], Figures]) -> None:
        """Store the figures of a phase, or its error. The other phases run even if one fails."""
        nonlocal failed
        try:
            figures[name] = measure_phase()
        except Exception as error:
            failed = True
            figures[name] = {"error": f"{type(error).__name__}: {error}"}
        click.echo(json.dumps({name: figures[name]}), err=True)
        if out is not None:
            atomic_write_bytes(out, json.dumps(outcome, indent=1).encode())

    phase("encoder_alone", partial(_run_alone, measure_encoder, setup))
    phase("search_alone", partial(_run_alone, measure_search, setup))
    with tempfile.TemporaryDirectory() as work:
        images = {}
        for width, height in IMAGE_SIZES:
            (subfolder := Path(work) / f"{width}x{height}").mkdir()
            images[subfolder.name] = write_photographs(subfolder, IMAGES, width, height)
        for number, count in enumerate(int(part) for part in processes.split(",")):
            phase(f"services_{count}", partial(_measure_services, setup, count, images, figures, single=number == 0))
    click.echo(json.dumps(outcome))
    if failed:
        sys.exit(1)


# ---- encoder and search alone ----


def _run_alone(measure_part: Callable[[Setup], Figures], setup: Setup) -> Figures:
    """Call a function in a process of its own, which frees the GPU's memory at its end."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_part, setup).result()


def measure_encoder(setup: Setup) -> Figures:
    """Return images per second by batch size: of the encoder as the service runs it (`encode`), of converting pixels to
    floats on the CPU (`normalise`) and of the session alone (`session`), the last also for mixed sizes up to 32."""
    bundle = Bundle.open(setup.bundle)
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    entry = bundle.manifest.image_encoder
    settings = Settings.model_validate({"device": setup.device, "max_batch": setup.batches[-1]})
    encoder = open_encoder(bundle, preprocessing, settings)
    session = open_session(bundle.image_encoder_path, settings.device, settings.thread_count)
    shape_HW3 = (preprocessing.size_px, preprocessing.size_px, 3)
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (setup.batches[-1], *shape_HW3), dtype=np.uint8)
    floats_B3HW = normalise(pixels_BHW3, preprocessing)

    def run_session(count: int) -> Any:
        return session.run([entry.outputs[1]], {entry.input: floats_B3HW[:count]})

    def images_per_s(call: Callable[[int], object], sizes: list[int]) -> float:
        took_s = _time_calls(call, sizes, setup.seconds / 4)
        return round(sum(sizes[i % len(sizes)] for i in range(len(took_s))) / sum(took_s), 1)

    steps: dict[str, Callable[[int], object]] = {
        "encode_per_s": lambda count: encoder.encode(pixels_BHW3[:count]),
        "normalise_per_s": lambda count: normalise(pixels_BHW3[:count], preprocessing),
        "session_per_s": run_session,
    }
    mixed_sizes = np.random.default_rng(1).permutation(np.arange(1, setup.service_batch + 1)).tolist()
    return {
        "device": encoder.device,
        "batches": {
            str(batch): {name: images_per_s(call, [batch]) for name, call in steps.items()} for batch in setup.batches
        },
        "mixed_sizes": {"session_per_s": images_per_s(run_session, mixed_sizes)},
    }


def measure_search(setup: Setup) -> Figures:
    """Return milliseconds of searching for one query and for 32: of the candidates on the GPU (`candidates`), and with
    the exact ranking and grouping by entity on the CPU (`search`)."""
    bundle = Bundle.open(setup.bundle)
    index = bundle.index(setup.device)
    faiss.omp_set_num_threads(Settings().thread_count)
    embeddings = bundle.embeddings()
    positions_Q = np.random.default_rng(2).integers(0, len(index), QUERIES)
    noise_QD = np.random.default_rng(3).standard_normal((QUERIES, bundle.manifest.embedding_dim), np.float32)
    queries_QD = embeddings.at(positions_Q) + 0.02 * noise_QD  # as close as good queries
    fetched = min(int(10 * DEFAULT_K_FACTOR), index.candidates.limit)  # as many as for a small top_k
    calls: dict[str, Callable[[Float32Array], object]] = {
        "candidates_ms": lambda queries_BD: index.candidates.search(queries_BD, fetched, {}, None, 1.0),
        "search_ms": lambda queries_BD: index.search(queries_BD, TOP_K),
    }
    by_batch: Figures = {}
    for batch in (1, setup.service_batch):
        batches = [queries_QD[start : start + batch] for start in range(0, QUERIES - batch, batch)]
        took_ms = {name: 1000 * np.array(_time_calls(call, batches, setup.seconds / 4)) for name, call in calls.items()}
        by_batch[str(batch)] = {
            name: dict(zip(("p50", "p99"), np.percentile(each, (50, 99)).round(3).tolist(), strict=True))
            for name, each in took_ms.items()
        }
    rows_QK, _ = index.search(queries_QD[:64], TOP_K)
    return {
        "device": index.device,
        "batches": by_batch,
        "nearest_is_first": round(float((rows_QK[:, 0] == embeddings.rows_N[positions_Q[:64]]).mean()), 3),
    }


def _time_calls(call: Callable[[Any], object], inputs: Sequence[Any], seconds: float) -> list[float]:
    """Return the durations of `call` for the inputs in turn, each at least once, after a few calls to warm up."""
    for i in range(3):
        call(inputs[i % len(inputs)])
    took_s: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end or len(took_s) < len(inputs):
        call(inputs[len(took_s) % len(inputs)])
        took_s.append(time.perf_counter() - started)
    return took_s


# ---- services under load ----


Service = tuple[subprocess.Popen[bytes], str]  # with its base URL


def _measure_services(
    setup: Setup, count: int, images: Mapping[str, list[str]], figures: Figures, *, single: bool
) -> Figures:
    """Measure `count` services with images of each size; with `single` also one request at a time."""
    found: Figures = {}
    with running_services(setup, count) as services:
        for size, paths in images.items():
            found[size] = {}
            if single:
                found[size]["one_at_a_time"] = run_load(
                    setup, services[:1], paths, connections=1, seconds=setup.seconds / 2
                )
            full = run_load(setup, services, paths, connections=setup.connections, seconds=setup.seconds)
            found[size]["full"] = full | shares(full, figures, setup.service_batch)
    return found


def divide_cores(cores: Sequence[int], parts: int) -> list[set[int]]:
    """Return the cores in so many parts. A part without cores of its own gets all of them."""
    return [set(part.tolist()) or set(cores) for part in np.array_split(np.array(cores), parts)]


@contextmanager
def running_services(setup: Setup, count: int) -> Iterator[list[Service]]:
    """Start services in parallel, each on its own cores if there are enough."""

    def start(cores: set[int]) -> Service:
        running = service_process(setup.bundle, "--cache", "off", "--device", setup.device, cores=cores)
        return stack.enter_context(running)

    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        yield list(pool.map(start, divide_cores(setup.service_cores, count)))


def run_load(
    setup: Setup, services: Sequence[Service], images: list[str], *, connections: int, seconds: float
) -> Figures:
    """Return throughput and latency of a closed loop over all services, and how busy each part was."""
    generators = min(connections, max(len(setup.generator_cores), len(services)))
    warm_up_s = min(WARM_UP_S, seconds)
    jobs = [
        Job(
            url=f"{services[number % len(services)][1]}/recognize?top_k={TOP_K}", images=images,
            cores=[setup.generator_cores[number % len(setup.generator_cores)]],
            connections=connections // generators, seconds=warm_up_s + seconds,
        )
        for number in range(generators)
    ]  # fmt: skip
    usage: list[list[Mapping[str, float]]] = []
    gpu_samples: list[str] = []

    def watch() -> None:
        time.sleep(warm_up_s)
        usage.append([_usage(service) for service in services])
        with sample_gpu(gpu_samples):
            time.sleep(seconds)
        usage.append([_usage(service) for service in services])

    runs = generate(jobs, watch)
    return {
        **summarise((each for run in runs for each in run.responses), warm_up_s=warm_up_s, seconds=seconds),
        "generator_busy": max(run.busy for run in runs),
        **busy(*usage, cores=len(setup.service_cores)),
        "gpu": gpu_figures(gpu_samples),
    }


def _usage(service: Service) -> Mapping[str, float]:
    """Return the metrics of a service, the time in seconds, and the CPU seconds of its main thread."""
    process, url = service
    fields = Path(f"/proc/{process.pid}/task/{process.pid}/stat").read_text().rpartition(")")[2].split()
    main_thread_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return {**scrape_metrics(url), "at_s": time.monotonic(), "main_thread_s": main_thread_s}


def busy(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], *, cores: int) -> Figures:
    """Return how busy the services, their main threads and their engines were, and their mean batch and stage times."""

    def total(name: str) -> float:
        return sum(new.get(name, 0.0) - old.get(name, 0.0) for old, new in zip(before, after, strict=True))

    def mean(name: str, labels: str = "") -> float:
        return total(f"{name}_sum{labels}") / max(total(f"{name}_count{labels}"), 1)

    took_s = total("at_s")  # of all services
    cpu_s = total("process_cpu_seconds_total")
    stages_ms = {stage: 1000 * mean("wikiclip_stage_seconds", f'{{stage="{stage}"}}') for stage in STAGES}
    # Each image is counted with the time of its whole batch, so this overestimates if batch sizes vary.
    engine_s = total("wikiclip_batch_images_count") * (stages_ms["encode"] + stages_ms["search"]) / 1000
    return {
        "cpu_ms_per_image": round(1000 * cpu_s / max(total(ANSWERED), 1), 3),
        "cores_busy": round(cpu_s / (took_s / len(before)) / cores, 3),
        "http_thread_busy": round(total("main_thread_s") / took_s, 3),
        "engine_busy": round(min(engine_s / took_s, 1.0), 3),
        "batch_images": round(mean("wikiclip_batch_images"), 2),
        "stages_ms": {stage: round(value, 3) for stage, value in stages_ms.items()},
    }


def shares(full: Figures, figures: Figures, batch: int) -> Figures:
    """Return the throughput relative to the encoder alone (`of_encoder_loop`), the share of the time that encoder and
    search alone would take on the GPU for it (`gpu_work_share`), and the first part that is full (`limited_by`)."""
    found: Figures = {}
    encoder, search = (figures[name].get("batches") for name in ("encoder_alone", "search_alone"))
    if encoder and search:
        alone = encoder[str(batch)]
        gpu_s_per_image = 1 / alone["session_per_s"] + search[str(batch)]["candidates_ms"]["p50"] / 1000 / batch
        found["of_encoder_loop"] = round(full["per_s"] / alone["encode_per_s"], 3)
        found["gpu_work_share"] = round(full["per_s"] * gpu_s_per_image, 3)
    parts = {
        "load generator": full["generator_busy"],
        "GPU": found.get("gpu_work_share", 0.0),
        "cores of the services": full["cores_busy"],
        "HTTP thread": full["http_thread_busy"],
        "engine": full["engine_busy"],
    }
    found["limited_by"] = next((name for name, share in parts.items() if share >= FULL), None)
    return found


# ---- exact search alone ----


@main.command()
@click.option("--vectors", default=6_063_945, help="Synthetic embeddings.")
@click.option("--dim", default=1280, help="Embedding width.")
@click.option("--bandwidth-gb-s", type=float, required=True, help="Memory bandwidth of all GPUs, by their data sheet.")
def search(vectors: int, dim: int, bandwidth_gb_s: float) -> None:
    """Measure exact search on the GPUs, and compare it with the time that reading the vectors takes."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / EMBEDDINGS_FOLDER
        write_embeddings(folder, vectors, dim)
        placed = placement(faiss.IndexFlatIP(dim), EmbeddingShards(folder, dim), "cuda")
    queries_QD = Population.of(dim).draw(QUERIES, np.random.default_rng(2))

    def call(batch: int, i: int) -> object:
        start = i * batch % QUERIES
        return placed.candidates.search(queries_QD[start : start + batch], 10, {}, None, 1)

    single = percentiles_ms(partial(call, 1), repeats=500, warm_up=20)
    batched = percentiles_ms(partial(call, 64), repeats=50, warm_up=5)
    figures = {
        "placed": placed.why,
        "floor_ms": round(2 * vectors * dim / bandwidth_gb_s / 1e6, 3),
        "single": single,
        "batch_64_queries_per_s": round(1000 * 64 / batched["p50_ms"], 1),
    }
    settings = {"vectors": vectors, "dim": dim, "bandwidth_gb_s": bandwidth_gb_s}
    click.echo(json.dumps({**describe_run(settings), "figures": figures}))


if __name__ == "__main__":
    run(main)
