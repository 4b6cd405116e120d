"""The service on a GPU at saturation, against the encoder alone in a loop, and what limits it.

`python -m benchmarks.gpu_service prepare --folder F` makes a bundle of 6,063,945 made-up entities with a ViT-L that
computes in float16, on a machine with or without a GPU; `python -m benchmarks.gpu_service measure --folder F` measures
on one with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_load import Load, one_at_a_time, saturate, services
from benchmarks.gpu_parts import BATCHES, SERVED, run_part
from benchmarks.synthetic import write_photographs
from core.cli import run
from core.errors import UserError
from core.files import atomic_write_bytes
from core.runtime import describe_run
from index.bundle import Bundle
from index.manifest import MANIFEST_FILE

PHOTOGRAPHS = ((640, 480), (1280, 960))
IMAGES = 16
FULL = 0.9  # of what a part can do, and it limits
RULE = (
    f"the first of these that is at {FULL:.0%} or above: a load generator's core; the GPU, by images a second times "
    "what encoder and search alone take on it in full batches; the services' cores; the thread that answers HTTP; the "
    f"engine (the GPU, in batches that are not full, where nvidia-smi says {FULL:.0%}, its own work on the CPU where "
    "not); else the fullest, named as not full"
)

Figures = dict[str, Any]


@click.group()
def main() -> None:
    """Images a second and p99 of the service on a GPU, and what limits them."""


@main.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Where the bundle goes.")
@click.option("--entities", default=6_063_945, show_default=True, help="Entities, an embedding each.")
@click.option("--encoder", default="vit-l14", show_default=True, help="Encoder, of benchmarks/generative/retrieval.py.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True, help="For measure.")
def prepare(folder: Path, entities: int, encoder: str, device: str) -> None:
    """Make the bundle, once; one that is there already is left as it is."""
    from benchmarks.synthetic import write_gpu_bundle

    if (folder / MANIFEST_FILE).exists():
        click.echo(f"{folder} is there already", err=True)
        return
    if folder.exists():
        raise UserError(f"{folder} is there and not whole; remove it")
    started = time.perf_counter()
    write_gpu_bundle(folder, encoder, entities, search_device=device, progress=True)
    click.echo(f"{folder} made in {time.perf_counter() - started:.0f} s", err=True)


@main.command()
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="The bundle that `prepare` made.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="How long each phase measures.")
@click.option("--processes", default="1,2,4", show_default=True, help="How many services, one run each.")
@click.option("--generator-cores", default=4, show_default=True, help="Cores that ask; the services have the others.")
@click.option("--connections", default=192, show_default=True, help="Connections of all load generators together.")
@click.option("--largest-batch", default=BATCHES[-1], show_default=True, help="Of the encoder alone.")
@click.option("--max-batch", default=0, show_default=True, help="Of the services; 0 is theirs.")
@click.option("--start-timeout-s", default=240.0, show_default=True, help="For a service to be ready.")
@click.option("--out", type=click.Path(path_type=Path), help="Also written here, after each phase.")
def measure(
    folder: Path,
    device: str,
    seconds: float,
    processes: str,
    generator_cores: int,
    connections: int,
    largest_batch: int,
    max_batch: int,
    start_timeout_s: float,
    out: Path | None,
) -> None:
    """Measure, and print JSON. A phase that fails has its error there instead of figures, and the exit code is 1."""
    bundle = Bundle.open(folder)
    generator, service = shared_out(sorted(os.sched_getaffinity(0)), generator_cores)
    settings = {
        "device": device, "bundle": bundle.name, "entities": bundle.manifest.counts.entities, "seconds": seconds,
        "connections": connections, "max_batch": max_batch, "generator_cores": len(generator),
        "service_cores": len(service),
    }  # fmt: skip
    report = _Report({**describe_run(settings), "gpu": gpu_name(), "figures": {"limited_by_rule": RULE}}, out)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        alone = partial(
            run_part, bundle=folder, work=work, device=device, seconds=seconds, largest_batch=largest_batch,
            timeout_s=start_timeout_s,
        )  # fmt: skip
        for part in ("encoder", "search"):
            report.phase(f"{part}_alone", partial(alone, part))
        photographs = {}
        for width, height in PHOTOGRAPHS:
            (images := work / f"{width}x{height}").mkdir()
            photographs[f"{width}x{height}"] = write_photographs(images, IMAGES, width, height)
        load = Load(
            bundle=folder, work=work, device=device, generator_cores=generator, service_cores=service,
            connections=connections, max_batch=max_batch, seconds=seconds, start_timeout_s=start_timeout_s,
        )  # fmt: skip
        for number, count in enumerate(int(part) for part in processes.split(",")):
            report.phase(
                f"services_{count}", partial(_services, load, count, photographs, report.figures, with_one=number == 0)
            )
    click.echo(json.dumps(report.content))
    if report.failed:
        sys.exit(1)


class _Report:
    """What is known so far, and where it is written to."""

    def __init__(self, content: Figures, out: Path | None) -> None:
        self.content = content
        self.figures: Figures = content["figures"]
        self.failed = False
        self._out = out

    def phase(self, name: str, measured: Callable[[], Figures]) -> None:
        """Put what is measured under that name, or the error that it ended with."""
        click.echo(f"{name} ...", err=True)
        started = time.perf_counter()
        try:
            self.figures[name] = measured()
        except Exception as error:
            # Whatever it was: the other phases are not to be lost with it.
            self.failed = True
            self.figures[name] = {"error": f"{type(error).__name__}: {error}"}
            click.echo(f"{name} failed: {error}", err=True)
        self.figures[name]["phase_s"] = round(time.perf_counter() - started, 1)
        click.echo(json.dumps({name: self.figures[name]}), err=True)
        if self._out is not None:
            atomic_write_bytes(self._out, json.dumps(self.content, indent=1).encode())


def _services(
    load: Load, count: int, photographs: Mapping[str, list[str]], figures: Figures, *, with_one: bool
) -> Figures:
    """So many services with each kind of photograph; `with_one`: and one request at a time before."""
    began = time.perf_counter()
    found: Figures = {}
    with services(load, count) as asked:
        found["ready_s"] = round(time.perf_counter() - began, 1)
        for size, images in photographs.items():
            each: Figures = {}
            if with_one:
                each["one_at_a_time"] = one_at_a_time(asked[0], images, load.seconds / 2)
            each["full"] = full = saturate(load, asked, images)
            floor_ms = gpu_ms_per_image(figures)
            if floor_ms is not None:
                full["gpu_work_share"] = round(full["per_s"] * floor_ms / 1000, 3)
                full["of_encoder_loop"] = round(full["per_s"] / _best_batch(figures)["encode_per_s"], 3)
            full["limited_by"] = limited_by(full)
            found[size] = each
    return found


def gpu_ms_per_image(figures: Figures) -> float | None:
    """What encoder and search alone take for an image in batches as large as a service has; None if not measured."""
    search = figures.get("search_alone", {}).get("batches")
    if search is None or "batches" not in figures.get("encoder_alone", {}):
        return None
    batch, largest = list(search.items())[-1]
    return float(1000 / _best_batch(figures)["session_per_s"] + largest["candidates_ms"]["p50"] / int(batch))


def _best_batch(figures: Figures) -> Mapping[str, float]:
    """The encoder alone in the largest batches that a service has."""
    batches = figures["encoder_alone"]["batches"]
    found: Mapping[str, float] = batches[max((batch for batch in batches if int(batch) <= SERVED), key=int)]
    return found


def limited_by(full: Mapping[str, Any]) -> str:
    """What `RULE` says of a phase's figures."""
    gpu = full.get("gpu") or {}
    utilisation = gpu.get("utilisation")
    in_engine = (
        f"the GPU, in batches of {full['batch_images']} images"
        if utilisation is not None and utilisation >= FULL
        else "the engine's thread, with its work on the CPU between the GPU's"
    )
    shares: Sequence[tuple[str, float]] = (
        ("the load generator", full["generator_busy"]),
        ("the GPU", full.get("gpu_work_share", 0.0)),
        ("the services' cores", full["cores_busy"]),
        ("the thread that answers HTTP", full["http_thread_busy"]),
        (in_engine, full["engine_busy"]),
    )
    for name, share in shares:
        if share >= FULL:
            return f"{name} ({share:.2f})"
    name, share = max(shares, key=lambda each: each[1])
    return f"nothing that is measured is full; the fullest is {name} ({share:.2f})"


def shared_out(cores: Sequence[int], wanted: int) -> tuple[list[int], list[int]]:
    """Cores of the load generators and of the services: as many as wanted, at most half; one core is for both."""
    taken = min(wanted, len(cores) // 2)
    return (list(cores[-taken:]), list(cores[:-taken])) if taken else (list(cores), list(cores))


def gpu_name() -> str | None:
    """The GPUs of this machine by nvidia-smi, None where there is none."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return ", ".join(told.stdout.split("\n")).strip(", ")


if __name__ == "__main__":
    run(main)
