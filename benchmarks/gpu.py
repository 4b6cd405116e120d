"""Search, encoder and service on a GPU, and the claim with baselines that need one.

`python -m benchmarks.gpu --folder F` prints the figures of docs/benchmarks.md as JSON, in under eight minutes on one
H200. It first writes a bundle of 6,063,945 synthetic entities with a ViT-L that computes in float16, if F is not there.

- `search`: `index.graph` by width, against the time of reading all vectors once at the bandwidth of a copy; faiss's
  flat search, its own and cuVS's, for the width of the bundle.
- `encoder`: a ViT-L alone, and with CUDA graphs.
- `services`: 1, 2 and 4 services on the GPU, each with its own copy of encoder and index and a share of the cores.
- `claim`: `wikiclip bench claim` with 7B and 13B, in the minutes that are left. It needs a torch with CUDA.

Shapes: B batch, Q queries, N embeddings, D embedding width.
"""

import json
import os
import shutil
import subprocess
import sys
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
from onnx import TensorProto, helper

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
from benchmarks.synthetic import Population, write_photographs, write_vit_bundle
from core.arrays import Device, Float16Array, Float32Array
from core.runtime import describe_run, faiss, onnxruntime
from imaging import Preprocessing, normalise
from index.bundle import Bundle
from index.embeddings import Embeddings
from index.faiss_index import faiss_reason
from index.graph import GraphCandidates, make_model, open_graph
from index.search import DEFAULT_K_FACTOR
from service.encoder import open_encoder
from service.settings import Settings
from wikiclip.cli import run

BASE = Path(__file__).parents[1] / "demo" / "bundle"
ENTITIES = 6_063_945
WIDTHS = (512, 768, 1280)
SERVICES = (1, 2, 4)
CLAIM_SIZES = ("7B", "13B")
IMAGES = 16
TOP_K = 5
WARM_UP_S = 1.0
GENERATOR_CORES = 4
BATCHES = (1, 8, 32)  # the last is the service's default maximum
QUERIES, REPEATS = 512, 50
STAGES = ("decode", "queue", "encode", "search")
_PART = 250_000  # synthetic embeddings that are drawn; the rest are the same with their numbers shifted
_COPIED_ELEMENTS = 2**30
_MIN_CLAIM_MINUTES = 1.0

Figures = dict[str, Any]
Service = tuple[subprocess.Popen[bytes], str]  # with its base URL


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--folder", required=True, type=click.Path(path_type=Path), help="Folder of the bundle.")
@click.option("--entities", default=ENTITIES, help="Entities, with one embedding each.", show_default=True)
@click.option("--encoder", default="vit-l14", help="Encoder, of benchmarks/generative/models.py.", show_default=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="cpu tests the command.")
@click.option("--seconds", default=8.0, help="Length of each measurement of the services.", show_default=True)
@click.option("--services", multiple=True, default=SERVICES, help="Services that share the GPU.", show_default=True)
@click.option("--connections", default=192, help="Connections of all load generators together.", show_default=True)
@click.option("--minutes", default=8.0, help="Time for all; what does not fit is left out.", show_default=True)
def main(
    folder: Path,
    entities: int,
    encoder: str,
    device: str,
    seconds: float,
    services: Sequence[int],
    connections: int,
    minutes: float,
) -> None:
    """Print JSON. The figures of each phase are also printed to stderr when it ends."""
    ends = time.monotonic() + 60 * minutes
    if not folder.exists():
        write_vit_bundle(folder, Bundle.open(BASE), encoder, entities, search_device=device)
    bundle = Bundle.open(folder)
    cores = split_cores(GENERATOR_CORES)
    settings = {
        "device": device, "seconds": seconds, "connections": connections, "bundle": bundle.name,
        "entities": bundle.manifest.counts.entities, "generator_cores": len(cores[0]), "service_cores": len(cores[1]),
    }  # fmt: skip

    def alone(measure_part: Callable[..., Figures], *arguments: Any) -> Figures:
        """Call a function in a process of its own, which frees the GPU's memory at its end."""
        return run_on_cores([(partial(measure_part, *arguments), os.sched_getaffinity(0))])[0]

    count, width = bundle.manifest.counts.entities, bundle.manifest.embedding_dim
    phases: list[tuple[str, str, Callable[[], Figures]]] = [
        ("encoder", "batches", partial(alone, measure_encoder, folder, device)),
        *(
            ("services", str(each), partial(measure_services, folder, device, each, connections, seconds))
            for each in services
        ),
        *(("search", str(each), partial(alone, measure_search, count, each, device)) for each in WIDTHS),
        ("search", "faiss", partial(alone, measure_faiss, count, width, device)),
        *(("claim", size, partial(measure_claim, size, device, ends)) for size in CLAIM_SIZES),
    ]
    figures: Figures = {}
    for name, case, phase in phases:
        late = time.monotonic() > ends
        figures.setdefault(name, {})[case] = {"left_out": "no time was left"} if late else phase()
        click.echo(json.dumps({name: {case: figures[name][case]}}), err=True)
    for each in figures["services"].values():
        if "full" in each:
            encode_per_s = figures["encoder"]["batches"][str(BATCHES[-1])]["encode_per_s"]
            each["of_encoder_loop"] = round(each["full"]["per_s"] / encode_per_s, 3)
    click.echo(json.dumps({**describe_run(settings), "gpu": _gpu_name(), "figures": figures}))


def _gpu_name() -> str | None:
    """Return the names of this machine's GPUs, or None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return ", ".join(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())


# ---- the encoder alone ----


def measure_encoder(folder: Path, device: str) -> Figures:
    """Return images per second by batch size: as the service encodes them (`encode`), and of the session on pixels
    that are on the device as floats, without and with CUDA graphs (`session`, `cuda_graph`)."""
    bundle = Bundle.open(folder)
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    settings = Settings.model_validate({"device": device, "max_batch": BATCHES[-1]})
    encoder = open_encoder(bundle, preprocessing, settings)
    shape_BHW3 = (BATCHES[-1], preprocessing.size_px, preprocessing.size_px, 3)
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, shape_BHW3, dtype=np.uint8)
    floats_B3HW = normalise(pixels_BHW3, preprocessing)

    def per_s(call: Callable[[], object], batch: int) -> float:
        took_ms = percentiles_ms(lambda _: call(), repeats=REPEATS, warm_up=3)["p50_ms"]
        return round(1000 * batch / took_ms, 1)

    batches: Figures = {}
    for batch in BATCHES:
        batches[str(batch)] = {"encode_per_s": per_s(partial(encoder.encode, pixels_BHW3[:batch]), batch)}
        for name, cuda_graph in (("session", False), ("cuda_graph", True)):
            if device == "cuda" or not cuda_graph:
                call = _bound_session(bundle, device, floats_B3HW[:batch], cuda_graph=cuda_graph)
                batches[str(batch)][f"{name}_per_s"] = per_s(call, batch)
    return batches


def _bound_session(bundle: Bundle, device: str, floats_B3HW: Float32Array, *, cuda_graph: bool) -> Callable[[], object]:
    """Return a call of the image encoder with input and output at fixed places on the device."""
    entry = bundle.manifest.image_encoder
    options = {"cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": str(int(cuda_graph))}
    providers = [("CUDAExecutionProvider", options)] if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(bundle.image_encoder_path), providers=providers)
    binding = session.io_binding()
    binding.bind_ortvalue_input(entry.input, onnxruntime.OrtValue.ortvalue_from_numpy(floats_B3HW, device))
    for output in session.get_outputs():
        shape = [len(floats_B3HW), *output.shape[1:]]
        if output.name == entry.outputs[1]:
            shape = [len(floats_B3HW), bundle.manifest.embedding_dim]
        elif output.name == entry.outputs[0]:
            shape = [len(floats_B3HW), bundle.manifest.patches, output.shape[-1]]
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device)
        binding.bind_ortvalue_output(output.name, value)
    return partial(session.run_with_iobinding, binding)


# ---- search alone ----


class SyntheticEmbeddings(Embeddings):
    """Any number of synthetic embeddings in parts that are made when they are read."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__(dim, [], [])
        self._drawn_nD = Population(dim).draw(min(_PART, count), np.random.default_rng(0)).astype(np.float16)
        self.rows_N = np.arange(count)
        self.starts = np.append(np.arange(0, count, _PART), count)

    @property
    def parts(self) -> int:
        return len(self.starts) - 1

    def stored_part(self, number: int) -> Float16Array:
        first, end = self.starts[number : number + 2]
        part_nD: Float16Array = np.roll(self._drawn_nD[: end - first], number, axis=1)
        return part_nD

    def queries(self) -> Float32Array:
        """Return queries [Q, D] as close to some embeddings as good queries are."""
        rng = np.random.default_rng(2)
        near_QD = self._drawn_nD[rng.integers(0, len(self._drawn_nD), QUERIES)].astype(np.float32)
        return near_QD + np.float32(0.02) * rng.standard_normal(near_QD.shape, np.float32)


def measure_search(count: int, width: int, device: str) -> Figures:
    """Return milliseconds of the graph for one query and for a batch, and as a multiple of reading all vectors once."""
    bytes_per_s = _read_bytes_per_s(device)
    embeddings = SyntheticEmbeddings(count, width)
    candidates = GraphCandidates(embeddings, [Device(device)])
    read_ms = 1000 * 2 * count * width / bytes_per_s
    figures: Figures = {"read_gb_per_s": round(bytes_per_s / 1e9, 1), "read_ms": round(read_ms, 3)}
    for batch in (1, BATCHES[-1]):
        search = partial(candidates.search, count=TOP_K, parameters={}, allowed_N=None, effort=1.0)
        took = _batches_ms(search, embeddings.queries(), batch)
        figures[str(batch)] = {**took, "times_reading": round(took["p50_ms"] / read_ms, 2)}
    return figures


def measure_faiss(count: int, width: int, device: str) -> Figures:
    """Return milliseconds of faiss's flat search over float16, its own and cuVS's, or why there is none."""
    if device == "cpu" or not hasattr(faiss, "StandardGpuResources"):
        return {"left_out": "this faiss has no GPU"}
    embeddings = SyntheticEmbeddings(count, width)
    vectors_ND = np.concatenate(list(embeddings))
    figures: Figures = {}
    for name, use_cuvs in (("own", False), ("cuvs", True)):
        try:
            resources, config = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
            config.useFloat16, config.use_cuvs = True, use_cuvs
            index = faiss.GpuIndexFlatIP(resources, width, config)
            index.add(vectors_ND)
        except RuntimeError as error:  # this wheel has no cuVS
            figures[name] = {"left_out": faiss_reason(error)}
            continue
        search = partial(index.search, k=int(10 * DEFAULT_K_FACTOR))  # as many as for a small top_k
        figures[name] = {str(batch): _batches_ms(search, embeddings.queries(), batch) for batch in (1, BATCHES[-1])}
    return figures


def _batches_ms(call: Callable[[Float32Array], object], queries_QD: Float32Array, batch: int) -> dict[str, float]:
    batches = np.split(queries_QD, len(queries_QD) // batch)
    return percentiles_ms(lambda i: call(batches[i % len(batches)]), repeats=REPEATS, warm_up=3)


def _read_bytes_per_s(device: str) -> float:
    """Return the bandwidth of the device's memory, from a copy within it: each byte is read and written."""
    elements = _COPIED_ELEMENTS if device == "cuda" else 2**24
    graph = helper.make_graph(
        [helper.make_node("Identity", ["from"], ["to"])],
        "copy",
        [helper.make_tensor_value_info("from", TensorProto.FLOAT16, [elements])],
        [helper.make_tensor_value_info("to", TensorProto.FLOAT16, [elements])],
    )
    session = open_graph(make_model(graph), Device(device))
    binding = session.io_binding()
    source = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(elements, np.float16), device)
    binding.bind_ortvalue_input("from", source)
    target = onnxruntime.OrtValue.ortvalue_from_shape_and_type([elements], np.float16, device)
    binding.bind_ortvalue_output("to", target)
    took_ms = percentiles_ms(lambda _: session.run_with_iobinding(binding), repeats=REPEATS, warm_up=3)["p50_ms"]
    return 2 * 2 * elements / took_ms * 1000


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


# ---- the claim ----


def measure_claim(size: str, device: str, ends: float) -> Figures:
    """Return the ratios of `wikiclip bench claim` with a baseline of that size, or why there are none."""
    minutes = (ends - time.monotonic()) / 60
    if device == "cpu" or minutes < _MIN_CLAIM_MINUTES:
        return {"left_out": "it needs a GPU" if device == "cpu" else "no time was left"}
    with tempfile.TemporaryDirectory() as results:
        command = [
            sys.executable, "-m", "wikiclip", "bench", "claim", "--bundle", str(BASE), "--size", size, "--device",
            device, "--minutes", f"{minutes:.1f}", "--results", results, "--json",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"left_out": done.stderr.splitlines()[-1]}
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    return {name: figures[name] for name in ("median_ms", "ratio", "verdict")}


if __name__ == "__main__":
    run(main)
