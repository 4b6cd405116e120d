"""`wikiclip bench claim`: retrieval against generation, both on this machine, interleaved, on the same images.

Retrieval is what the service does for an image, in a loop: decode, encoder, exact search; no HTTP, no queue.
LoadedBundle is AutoVER's inference on transformers with random weights (`benchmarks.generative`), once `faithful` and
once `optimised`. Batch 1, the same threads, matching precisions: float32 against float32 and int8 against int8 on a
CPU, bfloat16 against float16 on a GPU. Nothing sleeps and nothing is handicapped; every knob is in the figures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.claim_report import CLAIM, PAPER_MS, report, verdict
from benchmarks.generative.names import IMAGE, Names, collect_names, train_tokenizer
from benchmarks.generative.recognizer import (
    BEAMS,
    NAMES_IN_TREE,
    Generated,
    GenerativeRecognizer,
    clip_preprocessing,
    quantise,
)
from benchmarks.generative.retrieval import (
    ENCODERS,
    MAX_PIXELS,
    RetrievalRecognizer,
    Retrieved,
    TorchEncoder,
    TorchIndex,
    build_tower,
    cpu_index,
    open_encoder,
    quantised_file,
    write_encoder,
)
from benchmarks.generative.sizes import SIZES, VOCABULARY, build_model, parameter_count
from benchmarks.measure import Metric, Reference
from benchmarks.synthetic import photograph
from core.errors import UserError
from core.runtime import faiss, usable_cores
from demo.build import BUILD
from evaluation.metrics import RESAMPLINGS, percentile_interval
from imaging import load_pixels

__all__ = ["CLAIM", "PAPER_MS", "measure", "report", "verdict"]

SIZE, ENCODER, ENTITIES, REPEATS = "0.5B", "vit-b32", 100_000, 12
GPU_SIZE, GPU_ENCODER, GPU_ENTITIES = "7B", "vit-l14", 6_060_000
SMOKE_SIZE, SMOKE_ENTITIES, SMOKE_REPEATS = "135M", 2_000, 3
SMOKE_MINUTES = 0.5
BATCH = 8  # images at once where throughput is measured
QUICK_RUNS = 5  # of retrieval for one image, of which the median counts: generation gives one run the time of a hundred
_LEAST_IMAGES = 2

System = Callable[[bytes], Retrieved | Generated]


def measure(
    bundle_path: Path,
    *,
    smoke: bool,
    size: str | None = None,
    encoder: str | None = None,
    entities: int | None = None,
    repeats: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    minutes: float | None = None,
) -> dict[str, object]:
    """Median latency of each system, the ratios, CPU-seconds and stages by precision; float32's stand on top, too.

    `minutes` bounds it all, but two images in each precision are measured whatever they take. Raises `UserError` where
    there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; measure with --device cpu, or on a machine with one")
    gpu = device == "cuda"
    size = size or (SMOKE_SIZE if smoke else GPU_SIZE if gpu else SIZE)
    encoder = encoder or (GPU_ENCODER if gpu else ENCODER)
    entities = entities or (SMOKE_ENTITIES if smoke else GPU_ENTITIES if gpu else ENTITIES)
    repeats = repeats or (SMOKE_REPEATS if smoke else REPEATS)
    minutes = minutes or (SMOKE_MINUTES if smoke else None)
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    threads = threads or usable_cores()
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    names = collect_names(bundle_path, entities, BUILD / "sources", download=not smoke)
    generative = _Generative(size, names, device)
    precisions: dict[str, Any] = {}
    wanted = ("16 bits",) if gpu else ("float32",) if smoke else ("float32", "int8")
    with tempfile.TemporaryDirectory() as folder:
        for position, precision in enumerate(wanted):
            if precision == "int8":
                generative.quantise()
            retrieval, encoder_parameters = _retrieval(encoder, precision, len(names.names), Path(folder), threads)
            until = None
            if ends is not None:
                # What follows the images, their throughput and the next precision, gets its share of what is left.
                share = 0.8 if position == len(wanted) - 1 else 0.55
                until = time.monotonic() + share * (ends - time.monotonic())
            precisions[precision] = _compare(retrieval, generative, repeats, throughput=not smoke, until=until)
    first = precisions[wanted[0]]
    return {
        "median_ms": {name: system["median_ms"] for name, system in first["systems"].items()},
        "ratio": first["ratio"],
        "verdict": [
            line
            for name, each in precisions.items()
            for line in verdict(name, each["ratio"], each["ratio_interval"])
        ],
        "precisions": precisions,
        "parameters": {"retrieval": encoder_parameters, "generation": generative.parameters},
        "knobs": {
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "encoder": encoder, "baseline": size, "threads": threads, "batch": 1, "entities": len(names.names),
            "names": names.origin, "names_in_tree": min(NAMES_IN_TREE, len(names.names)), "beams": BEAMS,
            "image": "JPEG 1280x960", "image_tokens": generative.image_tokens, "search": "exact",
            "runs_of_retrieval_per_image": QUICK_RUNS, "batch_for_throughput": BATCH,
            "int8": f"per channel: ONNX Runtime's static; torch's dynamic, {torch.backends.quantized.engine}",
        },
        "peak_gflops": _peak_gflops(device),
        "paper_ms": PAPER_MS,
    }  # fmt: skip


def _retrieval(name: str, precision: str, entities: int, folder: Path, threads: int) -> tuple[RetrievalRecognizer, int]:
    """The recognizer in that precision, and how many parameters its encoder has."""
    shape = ENCODERS[name]
    if precision == "16 bits":
        tower = build_tower(shape, dtype=torch.float16, device="cuda")
        index = TorchIndex(entities, shape.embedding_dim, device="cuda", dtype=torch.float16)
        return RetrievalRecognizer(TorchEncoder(tower, clip_preprocessing(shape.size_px)), index), parameter_count(
            tower
        )
    file, parameters = write_encoder(name, folder)
    if precision == "int8":
        file = quantised_file(file, shape.size_px, folder)
    encoder = open_encoder(file, shape, threads=threads)
    return RetrievalRecognizer(encoder, cpu_index(entities, shape.embedding_dim)), parameters


class _Generative:
    """The baseline over names; its weights are random, and so are the names' retrieval embeddings."""

    def __init__(self, size: str, names: Names, device: str) -> None:
        tokenizer = train_tokenizer(names.names)
        image_token = tokenizer.token_to_id(IMAGE)
        assert image_token is not None, "it was trained with it"
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._model, self._head = build_model(
            SIZES[size], image_token=image_token, vocabulary=VOCABULARY, dtype=dtype, device=device
        )
        self.parameters = parameter_count(self._model, self._head)
        self.image_tokens = SIZES[size].tower.tokens
        self.language_gflop_per_token = 2e-9 * _linear_weights(self._model.model.language_model)
        self.tower_gflop = 2e-9 * _linear_weights(self._model.model.vision_tower) * (self.image_tokens + 1)
        drawn = torch.randn(len(names.names), SIZES[size].retrieval_dim, device=device)
        self._embeddings_NR = F.normalize(drawn, dim=1).to(dtype)
        self._tokenizer, self._names = tokenizer, names.names
        self.recognizer = self._recognizer()

    def quantise(self) -> None:
        """From now on in int8."""
        self._model = quantise(self._model)
        self.recognizer = self._recognizer()

    def _recognizer(self) -> GenerativeRecognizer:
        return GenerativeRecognizer(self._model, self._head, self._tokenizer, self._names, self._embeddings_NR)

    def gflops(self, stages_ms: dict[str, float], cpu_s: float) -> dict[str, float]:
        """What the linear layers' products of the first pass reach: each stage's a second, and all a CPU-second."""
        length = self.recognizer.prompt_1L.shape[1]
        work = {"image tower": self.tower_gflop, "prefill": self.language_gflop_per_token * length}
        reached = {stage: round(1000 * gflop / stages_ms[stage], 1) for stage, gflop in work.items()}
        return reached | {"a CPU-second": round(sum(work.values()) / cpu_s, 1)}


def _linear_weights(module: torch.nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def _compare(
    retrieval: RetrievalRecognizer, baseline: _Generative, repeats: int, *, throughput: bool, until: float | None
) -> dict[str, Any]:
    """The systems in turn on each image, so that what else the machine does falls on all alike."""
    images = [photograph(seed, 1280, 960) for seed in range(repeats)]
    generative, reference = baseline.recognizer, Reference()

    def generated(image: bytes, generate: Callable[[Any], Generated]) -> Generated:
        started = time.perf_counter()
        pixels_HW3 = load_pixels(image, generative.preprocessing, max_pixels=MAX_PIXELS)
        decode_ms = 1000 * (time.perf_counter() - started)
        answer = generate(pixels_HW3)
        return replace(answer, stages_ms={"decode image": decode_ms, **answer.stages_ms})

    systems: dict[str, System] = {
        "wikiclip": retrieval.recognize,
        "faithful": lambda image: generated(image, generative.faithful),
        "optimised": lambda image: generated(image, lambda pixels_HW3: generative.optimised(pixels_HW3[None])),
    }
    order = list(systems.items())
    latency = {name: Metric() for name in systems}
    cpu_s = {name: Metric(unit="CPU s") for name in systems}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    tokens: dict[str, list[int]] = {name: [] for name in systems}
    for name in ("wikiclip", "optimised"):  # the first one allocates
        systems[name](images[0])
    for done, image in enumerate(tqdm(images, desc="claim", unit="image")):
        if done >= _LEAST_IMAGES and until is not None and time.monotonic() > until:
            break
        order = order[1:] + order[:1]  # who comes after whom matters to caches: each comes after each
        for name, system in order:
            for metrics in (latency, cpu_s):
                metrics[name].reference_ms.append(reference.time_ms())
            runs = [_timed(system, image) for _ in range(QUICK_RUNS if name == "wikiclip" else 1)]
            latency[name].samples.append(1000 * float(np.median([run[0] for run in runs])))
            cpu_s[name].samples.append(float(np.mean([run[1] for run in runs])))
            stages[name] += [run[2].stages_ms for run in runs]
            tokens[name] += [count for run in runs if isinstance(run[2], Generated) for count in run[2].tokens]
    figures: dict[str, dict[str, Any]] = {}
    for name in systems:
        figures[name] = {
            "median_ms": latency[name].figures()["median"],
            "latency": latency[name].figures(),
            "cpu_seconds": cpu_s[name].figures(),
            "stages_ms": {
                stage: round(float(np.median([each[stage] for each in stages[name]])), 2) for stage in stages[name][0]
            },
            "images_per_s": {"batch 1": round(1000 / float(np.median(latency[name].samples)), 3)},
        }
        if tokens[name]:
            figures[name]["tokens"] = round(float(np.mean(tokens[name])), 1)
    figures["optimised"]["gflops"] = baseline.gflops(
        figures["optimised"]["stages_ms"], float(np.median(cpu_s["optimised"].samples))
    )
    if throughput:
        batch = [photograph(seed, 1280, 960) for seed in range(BATCH)]
        figures["wikiclip"]["images_per_s"][f"batch {BATCH}"] = _per_second(lambda: retrieval.recognize_batch(batch), 5)
        figures["optimised"]["images_per_s"][f"batch {BATCH}"] = _per_second(
            lambda: generative.optimised(
                np.stack([load_pixels(each, generative.preprocessing, max_pixels=MAX_PIXELS) for each in batch])
            ),
            1,
        )
    base = latency["wikiclip"].samples
    modes = [name for name in systems if tokens[name]]
    ratio = {name: round(float(np.median(latency[name].samples) / np.median(base)), 2) for name in modes}
    intervals = {name: _interval(_medians(latency[name].samples) / _medians(base)) for name in modes}
    cpu_base = cpu_s["wikiclip"].samples
    cpu_ratio = {name: round(float(np.median(cpu_s[name].samples) / np.median(cpu_base)), 2) for name in modes}
    cpu_intervals = {name: _interval(_medians(cpu_s[name].samples) / _medians(cpu_base)) for name in modes}
    return {
        "images": len(base), "systems": figures, "ratio": ratio, "ratio_interval": intervals,
        "cpu_seconds_ratio": cpu_ratio, "cpu_seconds_ratio_interval": cpu_intervals,
    }  # fmt: skip


def _timed(system: System, image: bytes) -> tuple[float, float, Retrieved | Generated]:
    started, cpu_started = time.perf_counter(), time.process_time()
    answer = system(image)
    return time.perf_counter() - started, time.process_time() - cpu_started, answer


def _per_second(call: Callable[[], object], runs: int) -> float:
    """Images a second in the best of a few runs, the most that it reaches."""
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return round(BATCH / min(taken), 3)


def _medians(values: list[float]) -> Any:
    """Of resamplings with replacement: the percentile bootstrap. Images are resampled alike for every system."""
    return np.median(np.random.default_rng(0).choice(values, (RESAMPLINGS, len(values))), axis=1)


def _interval(values: Any) -> list[float]:
    return [round(side, 2) for side in percentile_interval(values)]


def _peak_gflops(device: str) -> float:
    """What a large matrix product reaches here, the best of a few: the stages' figures are to be seen beside it."""
    side, best = (8192 if device == "cuda" else 1024), 0.0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        one = torch.randn(side, side, device=device, dtype=dtype)
        for _ in range(8):
            started = time.perf_counter()
            float((one @ one)[0, 0])  # reads a figure, and so waits for the GPU
            best = max(best, 2e-9 * side**3 / (time.perf_counter() - started))
    return round(best, 1)
