"""`wikiclip bench claim`: the paper's claim that retrieval is about 100 times as fast as generation, measured here.

Retrieval is what the service does for one image, without HTTP or queue: decode, encode, exact search, with the
service's own code (ONNX Runtime and faiss). Generation is AutoVER's inference with random weights
(`benchmarks.generative`), `faithful` and `optimised`. All systems take the same images in turn, with batch 1, the same
threads and matching precisions: float32 with float32 and int8 with int8 on a CPU, float16 with bfloat16 on a GPU.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.generative.models import (
    ENCODERS,
    SIZES,
    build_model,
    clip_preprocessing,
    parameter_count,
    write_encoder,
)
from benchmarks.generative.recognizer import (
    BEAMS,
    IMAGE,
    NAMES_IN_TREE,
    Answer,
    Clock,
    GenerativeRecognizer,
    token_id,
    train_tokenizer,
)
from benchmarks.measure import Probe, ratio_interval, sample
from benchmarks.synthetic import photograph
from core.errors import UserError
from core.runtime import faiss, usable_cores
from evaluation.pages import Bars, Report
from export.onnx import INPUT, OUTPUTS
from imaging import load_pixels
from index.bundle import Bundle
from index.embeddings import Embeddings
from index.gpu import placement
from index.search import EntityIndex
from service.encoder import OnnxEncoder
from service.settings import Device

CLAIM = 100
# Latencies that the paper reports for its own hardware: OVEN Entity validation, ms per image.
PAPER_MS = {"AutoVER 7B": 993, "AutoVER 13B": 1569, "WikiCLIP-L": 14.49}
REPORT = Report(
    title="Retrieval against generation",
    text=f"The claim is that retrieval is {CLAIM} times as fast as generation.",
    plots=(
        Bars(
            title="How many times as fast", label="times, with 95 % intervals", values=("precisions/*/ratio/*",),
            intervals=("precisions/*/ratio_interval/*",),
        ),
        Bars(title="Time per stage", label="ms", values=("precisions/*/systems/*/stages_ms/*",)),
    ),
)  # fmt: skip
_MOMENT_S = 0.4  # per round: several retrievals, and one generation, which takes about a hundred times as long
_TOP_K = 5


def _index(entities: int, dim: int, device: Device) -> EntityIndex:
    """Return the service's own exact index over random embeddings; search time does not depend on them."""
    vectors_ND = np.random.default_rng(0).standard_normal((entities, dim), dtype=np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    embeddings = Embeddings(dim, [vectors_ND.astype(np.float16)], [np.arange(entities)])
    flat = faiss.IndexFlatIP(dim)
    if device == "cpu":
        flat.add(vectors_ND)
    return EntityIndex(placement(flat, embeddings, device).candidates, embeddings, {})


def _retrieve(encoder: OnnxEncoder, index: EntityIndex, image: bytes) -> Answer:
    clock = Clock(torch.device("cpu"))
    pixels_HW3 = load_pixels(image, encoder.preprocessing)
    clock.lap("decode image")
    embedding_1D = encoder.encode(pixels_HW3[None])
    clock.lap("encode")
    rows_1K, _ = index.search(embedding_1D, _TOP_K)
    clock.lap("search")
    return Answer(row=int(rows_1K[0, 0]), stages_ms=clock.stages_ms)


def _generate(recognizer: GenerativeRecognizer, image: bytes, mode: str) -> Answer:
    clock = Clock(torch.device("cpu"))
    pixels_HW3 = load_pixels(image, recognizer.preprocessing)
    clock.lap("decode image")
    answer = recognizer.faithful(pixels_HW3) if mode == "faithful" else recognizer.optimised(pixels_HW3)
    return replace(answer, stages_ms={**clock.stages_ms, **answer.stages_ms})


def _generator(size: str, names: Sequence[str], device: str) -> tuple[GenerativeRecognizer, int]:
    """Return the baseline over names, with random weights and name embeddings, and its number of parameters."""
    tokenizer = train_tokenizer(names)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, head = build_model(SIZES[size], image_token=token_id(tokenizer, IMAGE), dtype=dtype, device=device)
    drawn = torch.randn(len(names), SIZES[size].retrieval_dim, device=device)
    recognizer = GenerativeRecognizer(model, head, tokenizer, names, F.normalize(drawn, dim=1).to(dtype))
    return recognizer, parameter_count(model, head)


def _names(bundle: Bundle, count: int) -> list[str]:
    """Return the bundle's titles, repeated up to `count`: decoding time depends on how long real names are."""
    with bundle.store() as store:
        titles = [entity.title for entity in store.by_rows(range(bundle.manifest.counts.entities))]
    return (titles * -(-count // len(titles)))[:count]


def measure(
    bundle_path: Path,
    *,
    smoke: bool,
    size: str | None = None,
    encoder: str | None = None,
    entities: int | None = None,
    device: Device = "cpu",
    minutes: float | None = None,
) -> dict[str, object]:
    """Return latencies, ratios and stages by precision. Those of float32 are also at the top level.

    `minutes` limits the run, but at least two images are measured in each precision. Raise `UserError` if the device
    does not exist.
    """
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; use --device cpu or a machine with a GPU")
    size = size or ("135M" if smoke else "7B" if gpu else "0.5B")
    encoder = encoder or ("vit-l14" if gpu else "vit-b32")
    entities = entities or (2_000 if smoke else 6_060_000 if gpu else 100_000)
    minutes = minutes or (0.5 if smoke else None)
    threads = usable_cores()
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    generative, generative_parameters = _generator(size, _names(Bundle.open(bundle_path), entities), device)
    precisions: dict[str, Any] = {}
    planned = ("float16",) if gpu else ("float32",) if smoke else ("float32", "int8")
    shape = ENCODERS[encoder]
    index = _index(entities, shape.embedding_dim, device)
    with tempfile.TemporaryDirectory() as folder:
        for precision in planned:
            if precision == "int8":
                generative.quantise()
            file = Path(folder) / f"{precision}.onnx"
            encoder_parameters = write_encoder(encoder, file, precision)
            session = OnnxEncoder(
                file, clip_preprocessing(shape.size_px), input_name=INPUT, patches_name=OUTPUTS[0],
                embedding_name=OUTPUTS[1], embedding_dim=shape.embedding_dim, device=device, threads=threads,
            )  # fmt: skip
            retrieve = partial(_retrieve, session, index)
            share = 0.9 if precision == planned[-1] else 0.6  # of the time left; int8 takes less than float32
            until = None if ends is None else time.monotonic() + share * (ends - time.monotonic())
            precisions[precision] = _compare(retrieve, generative, 3 if smoke else 12, until)
    first = precisions[planned[0]]
    return {
        "median_ms": {name: system["latency"]["median"] for name, system in first["systems"].items()},
        "ratio": first["ratio"],
        "verdict": [
            line
            for name, each in precisions.items()
            for line in verdict(name, each["ratio"], each["ratio_interval"])
        ],
        "precisions": precisions,
        "parameters": {"retrieval": encoder_parameters, "generation": generative_parameters},
        "knobs": {
            "device": torch.cuda.get_device_name() if gpu else "cpu",
            "encoder": encoder, "baseline": size, "threads": threads, "batch": 1, "entities": entities,
            "names_in_tree": min(NAMES_IN_TREE, entities), "beams": BEAMS,
            "image": "JPEG 1280x960", "image_tokens": SIZES[size].tower.patches, "search": "exact",
            "int8": f"per channel: ONNX Runtime's static; torch's dynamic, {torch.backends.quantized.engine}",
        },
        "paper_ms": PAPER_MS,
    }  # fmt: skip


def _compare(
    retrieve: Callable[[bytes], Answer], generative: GenerativeRecognizer, repeats: int, until: float | None
) -> dict[str, Any]:
    """Time all systems in turn, so that other work on the machine affects them alike."""
    images = [photograph(seed, 1280, 960) for seed in range(repeats)]
    systems: dict[str, Callable[[bytes], Answer]] = {
        "wikiclip": retrieve,
        "faithful": partial(_generate, generative, mode="faithful"),
        "optimised": partial(_generate, generative, mode="optimised"),
    }
    answers: dict[str, list[Answer]] = {name: [] for name in systems}

    def probe(name: str) -> Probe:
        def call(number: int) -> None:
            answers[name].append(systems[name](images[number % len(images)]))

        return Probe(name=name, call=call)

    latency = sample(
        [probe(name) for name in systems], rounds=repeats, moment_s=_MOMENT_S, until=until, description="claim"
    )
    figures: dict[str, Any] = {}
    for name, (_, *given) in answers.items():  # the first call is the warm-up
        stages = {stage: np.median([each.stages_ms[stage] for each in given]) for stage in given[0].stages_ms}
        figures[name] = {
            "latency": latency[name].figures(),
            "stages_ms": {stage: round(float(stage_ms), 2) for stage, stage_ms in stages.items()},
        }
        if tokens := [each.tokens for each in given if each.tokens is not None]:
            figures[name]["tokens"] = round(float(np.mean(tokens)), 1)
    retrieval = latency["wikiclip"].samples
    pairs = {mode: (latency[mode].samples, retrieval) for mode in ("faithful", "optimised")}
    return {
        "images": len(retrieval),
        "systems": figures,
        "ratio": {mode: round(float(np.median(a) / np.median(b)), 2) for mode, (a, b) in pairs.items()},
        "ratio_interval": {mode: ratio_interval(a, b) for mode, (a, b) in pairs.items()},
    }


def verdict(precision: str, ratio: dict[str, float], intervals: dict[str, list[float]]) -> list[str]:
    """Return the ratios with the claim in words. An interval that contains the claim decides nothing."""
    lines = []
    for mode, times in ratio.items():
        low, high = intervals[mode]
        relation = "at least" if low >= CLAIM else "less than" if high < CLAIM else "not distinguishable from"
        lines.append(f"{precision}, {mode}: {times} times ({low} to {high}), {relation} the {CLAIM} of the claim")
    return lines
