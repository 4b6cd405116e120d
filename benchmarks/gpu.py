"""The service on a GPU at saturation, compared with the encoder alone in a loop.

`python -m benchmarks.gpu prepare --folder F` writes a bundle of 6,063,945 synthetic entities with a ViT-L that computes
in float16. It needs no GPU. `measure --folder F` measures the bundle on a GPU. Several services on one GPU
(`--services`) each have their own copy of encoder and index, and a share of the cores.

Shapes: B batch, Q queries, D embedding width.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.generator import (
    Job,
    generate,
    run_on_cores,
    scrape_metrics,
    service_process,
    split_cores,
    summarise,
)
from benchmarks.measure import percentiles_ms
from benchmarks.synthetic import write_photographs, write_vit_bundle
from core.arrays import Float32Array
from core.cli import run
from core.errors import UserError
from core.runtime import describe_run, faiss
from imaging import Preprocessing, normalise
from index.bundle import Bundle
from index.search import DEFAULT_K_FACTOR
from service.encoder import open_encoder, open_session
from service.settings import Settings

BASE = Path(__file__).parents[1] / "demo" / "bundle"
IMAGES = 16
TOP_K = 5
WARM_UP_S = 1.0
GENERATOR_CORES = 4
BATCHES = (1, 8, 32)  # the last is the service's default maximum
QUERIES, REPEATS = 512, 50
STAGES = ("decode", "queue", "encode", "search")

Figures = dict[str, Any]
Service = tuple[subprocess.Popen[bytes], str]  # with its base URL


@click.group()
def main() -> None:
    """Measure the service on a GPU."""


@main.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Folder for the bundle.")
@click.option("--entities", default=6_063_945, help="Entities, with one embedding each.")
@click.option("--encoder", default="vit-l14", help="Encoder, of benchmarks/generative/models.py.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="For `measure`.")
def prepare(folder: Path, entities: int, encoder: str, device: str) -> None:
    """Write the bundle."""
    if folder.exists():
        raise UserError(f"{folder} exists; remove it, or give another folder")
    write_vit_bundle(folder, Bundle.open(BASE), encoder, entities, search_device=device)


@main.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="The bundle of `prepare`.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--seconds", default=8.0, help="Length of each measurement of the services.")
@click.option("--services", default=1, type=click.IntRange(min=1), help="Services that share the GPU.")
@click.option("--connections", default=192, help="Connections of all load generators together.")
def measure(folder: Path, device: str, seconds: float, services: int, connections: int) -> None:
    """Measure, and print JSON. The figures of each phase are also printed to stderr when it ends."""
    bundle = Bundle.open(folder)
    cores = split_cores(GENERATOR_CORES)
    settings = {
        "device": device, "seconds": seconds, "services": services, "connections": connections, "bundle": bundle.name,
        "entities": bundle.manifest.counts.entities, "generator_cores": len(cores[0]), "service_cores": len(cores[1]),
    }  # fmt: skip

    def alone(measure_part: Callable[[Path, str], Figures]) -> Figures:
        """Call a function in a process of its own, which frees the GPU's memory at its end."""
        return run_on_cores([(partial(measure_part, folder, device), os.sched_getaffinity(0))])[0]

    figures: Figures = {}
    phases: dict[str, Callable[[], Figures]] = {
        "encoder_alone": partial(alone, measure_encoder),
        "search_alone": partial(alone, measure_search),
        "services": partial(measure_services, folder, device, services, connections, seconds),
        "shares": partial(shares, figures),
    }
    for name, phase in phases.items():
        figures[name] = phase()
        click.echo(json.dumps({name: figures[name]}), err=True)
    click.echo(json.dumps({**describe_run(settings), "gpu": _gpu_name(), "figures": figures}))


def _gpu_name() -> str | None:
    """Return the names of this machine's GPUs, or None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return ", ".join(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())


# ---- encoder and search alone ----


def measure_encoder(folder: Path, device: str) -> Figures:
    """Return images per second by batch size: of the encoder as the service runs it (`encode`), and of its session
    alone on pixels that are already floats (`session`)."""
    bundle = Bundle.open(folder)
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    entry = bundle.manifest.image_encoder
    settings = Settings.model_validate({"device": device, "max_batch": BATCHES[-1]})
    encoder = open_encoder(bundle, preprocessing, settings)
    session = open_session(bundle.image_encoder_path, settings.device, settings.thread_count)
    shape_BHW3 = (BATCHES[-1], preprocessing.size_px, preprocessing.size_px, 3)
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, shape_BHW3, dtype=np.uint8)
    floats_B3HW = normalise(pixels_BHW3, preprocessing)

    def per_s(call: Callable[[int], object], batch: int) -> float:
        took_ms = percentiles_ms(lambda _: call(batch), repeats=REPEATS, warm_up=3)["p50_ms"]
        return round(1000 * batch / took_ms, 1)

    batches = {
        str(batch): {
            "encode_per_s": per_s(lambda count: encoder.encode(pixels_BHW3[:count]), batch),
            "session_per_s": per_s(
                lambda count: session.run([entry.outputs[1]], {entry.input: floats_B3HW[:count]}), batch
            ),
        }
        for batch in BATCHES
    }
    return {"device": encoder.device, "batches": batches}


def measure_search(folder: Path, device: str) -> Figures:
    """Return milliseconds of searching for one query and for a batch: of the candidates on the GPU (`candidates`), and
    with the exact ranking and grouping by entity on the CPU (`search`)."""
    bundle = Bundle.open(folder)
    index = bundle.index(device)
    faiss.omp_set_num_threads(Settings().thread_count)
    rng = np.random.default_rng(2)
    near_QD = bundle.embeddings().at(rng.integers(0, len(index), QUERIES))
    queries_QD = near_QD + 0.02 * rng.standard_normal(near_QD.shape, np.float32)  # as close as good queries
    fetched = min(int(10 * DEFAULT_K_FACTOR), index.candidates.limit)  # as many as for a small top_k

    def took_ms(call: Callable[[Float32Array], object], batch: int) -> dict[str, float]:
        batches = np.split(queries_QD, QUERIES // batch)
        return percentiles_ms(lambda i: call(batches[i % len(batches)]), repeats=REPEATS, warm_up=3)

    by_batch = {
        str(batch): {
            "candidates": took_ms(lambda each: index.candidates.search(each, fetched, {}, None, 1.0), batch),
            "search": took_ms(lambda each: index.search(each, TOP_K), batch),
        }
        for batch in (1, BATCHES[-1])
    }
    return {"device": index.device, "batches": by_batch}


# ---- services under load ----


def measure_services(folder: Path, device: str, count: int, connections: int, seconds: float) -> Figures:
    """Return the figures of one request at a time to one of the services, and of a closed loop over all (`full`)."""
    service_cores = np.array(sorted(split_cores(GENERATOR_CORES)[1]))
    parts = [set(part.tolist()) or set(service_cores.tolist()) for part in np.array_split(service_cores, count)]
    flags = ("--cache", "off", "--device", device)
    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        images = write_photographs(Path(stack.enter_context(tempfile.TemporaryDirectory())), IMAGES, 1280, 960)
        services = list(
            pool.map(lambda cores: stack.enter_context(service_process(folder, *flags, cores=cores)), parts)
        )
        return {
            "one_at_a_time": run_load(services[:1], images, connections=1, seconds=seconds),
            "full": run_load(services, images, connections=connections, seconds=seconds),
        }


def run_load(services: Sequence[Service], images: list[str], *, connections: int, seconds: float) -> Figures:
    """Return throughput and latency of a closed loop over all services, and how busy each part was."""
    generator_cores, service_cores = (sorted(cores) for cores in split_cores(GENERATOR_CORES))
    generators = min(connections, max(len(generator_cores), len(services)))
    jobs = [
        Job(
            url=f"{services[number % len(services)][1]}/recognize?top_k={TOP_K}", images=images,
            cores=[generator_cores[number % len(generator_cores)]],
            connections=connections // generators, seconds=WARM_UP_S + seconds,
        )
        for number in range(generators)
    ]  # fmt: skip
    metrics: list[list[Mapping[str, float]]] = []

    def watch() -> None:
        for pause_s in (WARM_UP_S, seconds):
            time.sleep(pause_s)
            metrics.append([scrape_metrics(url) for _, url in services])

    runs = generate(jobs, watch)
    return {
        **summarise((each for run in runs for each in run.responses), warm_up_s=WARM_UP_S, seconds=seconds),
        "generator_busy": max(run.busy for run in runs),
        **busy(*metrics, seconds=seconds, cores=len(service_cores)),
    }


def busy(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]], *, seconds: float, cores: int
) -> Figures:
    """Return how busy the services' cores were, and their mean batch and stage times, from their metrics."""

    def total(name: str) -> float:
        return sum(new.get(name, 0.0) - old.get(name, 0.0) for old, new in zip(before, after, strict=True))

    def mean(name: str, labels: str = "") -> float:
        return total(f"{name}_sum{labels}") / max(total(f"{name}_count{labels}"), 1)

    return {
        "cores_busy": round(total("process_cpu_seconds_total") / seconds / cores, 3),
        "batch_images": round(mean("wikiclip_batch_images"), 2),
        "stages_ms": {name: round(1000 * mean("wikiclip_stage_seconds", f'{{stage="{name}"}}'), 3) for name in STAGES},
    }


def shares(figures: Figures) -> Figures:
    """Return the throughput relative to the encoder alone (`of_encoder_loop`), and the share of the time that encoder
    and search alone would take on the GPU for it (`gpu_work_share`): near 1, the GPU limits the services."""
    batch = BATCHES[-1]
    full = figures["services"]["full"]
    encoder, search = (figures[name]["batches"][str(batch)] for name in ("encoder_alone", "search_alone"))
    gpu_s_per_image = 1 / encoder["session_per_s"] + search["candidates"]["p50_ms"] / 1000 / batch
    return {
        "of_encoder_loop": round(full["per_s"] / encoder["encode_per_s"], 3),
        "gpu_work_share": round(full["per_s"] * gpu_s_per_image, 3),
    }


if __name__ == "__main__":
    run(main)
