"""`wikiclip bench claim`: retrieval against generation, both on this machine, interleaved, on the same images.

Retrieval is what the service does for an image, in a loop: decode, ONNX encoder, exact search; no HTTP, no queue.
Generation is AutoVER's inference on transformers with random weights
(`benchmarks.generative`), once `faithful` and once `optimised`. Batch 1, the same threads, matching precisions: float32
against float32, int8 against int8. Nothing sleeps and nothing is handicapped; every knob is in the figures.
"""

from __future__ import annotations

import os
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
    MAX_PIXELS,
    VIT_B32,
    RetrievalRecognizer,
    Retrieved,
    open_encoder,
    quantised_file,
    write_vit_b32,
)
from benchmarks.generative.sizes import SIZES, VOCABULARY, build_model, parameter_count
from benchmarks.photographs import photograph
from benchmarks.statistics import RESAMPLINGS, percentile_interval
from imaging import load_pixels

CLAIM = 100  # times faster, says the paper
# What the paper reports on its own hardware: OVEN Entity validation, ms an image.
PAPER_MS = {"AutoVER 7B": 993, "AutoVER 13B": 1569, "WikiCLIP-L": 14.49}

SIZE, ENTITIES, REPEATS = "0.5B", 100_000, 9
SMOKE_SIZE, SMOKE_ENTITIES, SMOKE_REPEATS = "135M", 2_000, 3
BATCH = 8  # images at once where throughput is measured


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Median latency of each system, the ratios, CPU-seconds and stages by precision; float32's stand on top, too."""
    size = SMOKE_SIZE if smoke else SIZE
    repeats = SMOKE_REPEATS if smoke else REPEATS
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        names = collect_names(
            bundle_path, SMOKE_ENTITIES if smoke else ENTITIES, Path(folder) / "packages", download=not smoke
        )
        encoder_file, encoder_parameters = write_vit_b32(Path(folder))
        generative = _Generative(size, names)
        precisions: dict[str, Any] = {}
        for precision in ("float32",) if smoke else ("float32", "int8"):
            if precision == "int8":
                encoder_file = quantised_file(encoder_file, Path(folder))
                generative.quantise()
            encoder = open_encoder(encoder_file, clip_preprocessing(224), 512, threads=threads)
            retrieval = RetrievalRecognizer(encoder, 512, len(names.names), threads=threads)
            precisions[precision] = _compare(retrieval, generative.recognizer, repeats, throughput=not smoke)
    first = precisions["float32"]
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
            "encoder": VIT_B32, "baseline": size, "threads": threads, "batch": 1, "entities": len(names.names),
            "names": names.origin, "names_in_tree": min(NAMES_IN_TREE, len(names.names)), "beams": BEAMS,
            "repeats": repeats, "image": "JPEG 1280x960", "search": "exact, float32",
        },
        "paper_ms": PAPER_MS,
    }  # fmt: skip


class _Generative:
    """The baseline over names; its weights are random, and so are the names' retrieval embeddings."""

    def __init__(self, size: str, names: Names) -> None:
        tokenizer = train_tokenizer(names.names)
        image_token = tokenizer.token_to_id(IMAGE)
        assert image_token is not None, "it was trained with it"
        torch.manual_seed(0)
        self._model, self._head = build_model(SIZES[size], image_token=image_token, vocabulary=VOCABULARY, device="cpu")
        self.parameters = parameter_count(self._model, self._head)
        self._embeddings_NR = F.normalize(torch.randn(len(names.names), SIZES[size].retrieval_dim), dim=1)
        self._tokenizer, self._names = tokenizer, names.names
        self.recognizer = self._recognizer()

    def quantise(self) -> None:
        """From now on in int8."""
        self._model = quantise(self._model)
        self.recognizer = self._recognizer()

    def _recognizer(self) -> GenerativeRecognizer:
        return GenerativeRecognizer(self._model, self._head, self._tokenizer, self._names, self._embeddings_NR)


def _compare(
    retrieval: RetrievalRecognizer, generative: GenerativeRecognizer, repeats: int, *, throughput: bool
) -> dict[str, Any]:
    """The systems in turn on each image, so that what else the machine does falls on all alike."""
    images = [photograph(seed, 1280, 960) for seed in range(repeats)]

    def decoded(image: bytes) -> Any:
        return load_pixels(image, generative.preprocessing, max_pixels=MAX_PIXELS)

    def generated(image: bytes, generate: Callable[[Any], Generated]) -> Generated:
        started = time.perf_counter()
        pixels_HW3 = decoded(image)
        decode_ms = 1000 * (time.perf_counter() - started)
        answer = generate(pixels_HW3)
        return replace(answer, stages_ms={"decode image": decode_ms, **answer.stages_ms})

    systems: dict[str, Callable[[bytes], Retrieved | Generated]] = {
        "wikiclip": retrieval.recognize,
        "faithful": lambda image: generated(image, generative.faithful),
        "optimised": lambda image: generated(image, lambda pixels_HW3: generative.optimised(pixels_HW3[None])),
    }
    order = list(systems.items())
    taken_ms: dict[str, list[float]] = {name: [] for name in systems}
    cpu_s: dict[str, list[float]] = {name: [] for name in systems}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    tokens: dict[str, list[int]] = {name: [] for name in systems}
    for system in systems.values():
        system(images[0])  # the first one allocates
    for image in tqdm(images, desc="claim", unit="image"):
        order = order[1:] + order[:1]  # who comes after whom matters to caches: each comes after each
        for name, system in order:
            started, cpu_started = time.perf_counter(), time.process_time()
            answer = system(image)
            taken_ms[name].append(1000 * (time.perf_counter() - started))
            cpu_s[name].append(time.process_time() - cpu_started)
            stages[name].append(answer.stages_ms)
            if isinstance(answer, Generated):
                tokens[name] += answer.tokens
    figures: dict[str, dict[str, Any]] = {}
    for name, taken in taken_ms.items():
        figures[name] = {
            "median_ms": round(float(np.median(taken)), 2),
            "interval_ms": _interval(_medians(taken)),
            "cpu_s": round(float(np.median(cpu_s[name])), 4),
            "stages_ms": {
                stage: round(float(np.median([each[stage] for each in stages[name]])), 2) for stage in stages[name][0]
            },
        }
        if tokens[name]:
            figures[name]["tokens"] = round(float(np.mean(tokens[name])), 1)
    if throughput:
        batch = [photograph(seed, 1280, 960) for seed in range(BATCH)]
        figures["wikiclip"]["images_per_s"] = _per_second(lambda: retrieval.recognize_batch(batch))
        figures["optimised"]["images_per_s"] = _per_second(
            lambda: generative.optimised(np.stack([decoded(image) for image in batch]))
        )
    base = taken_ms["wikiclip"]
    modes = [name for name in systems if tokens[name]]
    ratio = {name: round(float(np.median(taken_ms[name]) / np.median(base)), 1) for name in modes}
    intervals = {name: _interval(_medians(taken_ms[name]) / _medians(base)) for name in modes}
    return {"systems": figures, "ratio": ratio, "ratio_interval": intervals}


def verdict(precision: str, ratio: dict[str, float], intervals: dict[str, list[float]]) -> list[str]:
    """The ratios against the claim, in words; an interval that holds the claim tells nothing either way."""
    lines = []
    for mode, times in ratio.items():
        low, high = intervals[mode]
        against = "at least" if low >= CLAIM else "less than" if high < CLAIM else "not to be told apart from"
        lines.append(f"{precision}, {mode}: {times} times ({low} to {high}), {against} the {CLAIM} of the claim")
    return lines


def _per_second(call: Callable[[], object]) -> float:
    call()
    started = time.perf_counter()
    call()
    return round(BATCH / (time.perf_counter() - started), 3)


def _medians(values: list[float]) -> Any:
    """Of resamplings with replacement: the percentile bootstrap. Images are resampled alike for every system."""
    return np.median(np.random.default_rng(0).choice(values, (RESAMPLINGS, len(values))), axis=1)


def _interval(values: Any) -> list[float]:
    return [round(side, 2) for side in percentile_interval(values)]
