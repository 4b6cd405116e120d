"""The encoder alone and the search alone, on a GPU: what the service is held against.

`python -m benchmarks.gpu_parts JOB.json` prints figures as JSON, from a process of its own, so that what it held of the
GPU is free again when it has ended.

Shapes: B batch, Q queries, K results, D the embedding width.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.runtime import faiss

# isort: split
import numpy as np

from core.errors import UserError
from imaging import Preprocessing, normalise
from index.bundle import Bundle
from index.search import DEFAULT_K_FACTOR, Float32Array
from service.encoder import open_session
from service.loaded_bundle import open_encoder
from service.settings import Settings

BATCHES = (1, 8, 32, 64)
SERVED = 32  # images at once, at most, where the service is told nothing
TOP_K = 5
_FETCHED = int(10 * DEFAULT_K_FACTOR)  # candidates of a query, where so few are asked for
_QUERIES = 512
_TOLD_OF_A_FAILURE = 2000  # characters


def run_part(
    part: str, bundle: Path, work: Path, *, device: str, seconds: float, largest_batch: int, timeout_s: float
) -> dict[str, Any]:
    """Run `encoder` or `search` in a process of its own. Raises `UserError` with what it said last if that fails."""
    path = work / f"{part}.json"
    job = {"bundle": str(bundle), "device": device, "seconds": seconds, "largest_batch": largest_batch}
    path.write_text(json.dumps({"part": part, **job}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.gpu_parts", str(path)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{part} alone took longer than {timeout_s:g} s") from error
    if ended.returncode:
        raise UserError(f"{part} alone ended with exit code {ended.returncode}: {ended.stderr[-_TOLD_OF_A_FAILURE:]}")
    figures: dict[str, Any] = json.loads(ended.stdout)
    return figures


def encoder_alone(bundle: Bundle, device: str, seconds: float, largest_batch: int) -> dict[str, Any]:
    """Images a second of the encoder as the service runs it (`encode`), and of its steps: pixels to floats, which is
    done on the CPU (`normalise`), and the session that is run on what is ready (`session`); for each size alone, and of
    the session for all up to 32 in turn. Each is measured for a quarter of `seconds`.
    """
    used = [batch for batch in BATCHES if batch <= largest_batch]
    started = time.perf_counter()
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    entry = bundle.manifest.image_encoder
    settings = Settings.model_validate({"device": device, "max_batch": used[-1]})
    encoder = open_encoder(bundle, preprocessing, settings)
    opened_s = time.perf_counter() - started
    session = open_session(bundle.image_encoder_path, settings.device, settings.thread_count)
    shape_HW3 = (preprocessing.size_px, preprocessing.size_px, 3)
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (used[-1], *shape_HW3), dtype=np.uint8)
    floats_B3HW = normalise(pixels_BHW3, preprocessing)

    def encode(count: int) -> Any:
        return encoder.encode(pixels_BHW3[:count])

    def to_floats(count: int) -> Any:
        return normalise(pixels_BHW3[:count], preprocessing)

    def run_session(count: int) -> Any:
        return session.run([entry.outputs[1]], {entry.input: floats_B3HW[:count]})

    batches = {
        str(batch): {
            "encode_per_s": _rate(encode, [batch], seconds / 4),
            "normalise_per_s": _rate(to_floats, [batch], seconds / 4),
            "session_per_s": _rate(run_session, [batch], seconds / 4),
        }
        for batch in used
    }
    sizes = np.random.default_rng(1).permutation(np.arange(1, min(SERVED, used[-1]) + 1)).tolist()
    started = time.perf_counter()
    for size in sizes:
        run_session(size)
    mixed = {"first_pass_s": round(time.perf_counter() - started, 3)}
    mixed["session_per_s"] = _rate(run_session, sizes, seconds / 4)
    return {
        "device": encoder.device,
        "opened_s": round(opened_s, 2),
        "batches": batches,
        f"sizes_1_to_{len(sizes)}_in_turn": mixed,
    }


def search_alone(bundle: Bundle, device: str, seconds: float, largest_batch: int) -> dict[str, Any]:
    """Milliseconds of a search of one query and of 32, or `largest_batch`: of what is nearest on the GPU
    (`candidates`), and with the exact order and the entities that the CPU makes of it (`search`)."""
    started = time.perf_counter()
    index = bundle.index(device)
    faiss.omp_set_num_threads(Settings().thread_count)
    opened_s = time.perf_counter() - started
    embeddings = bundle.embeddings()
    positions_Q = np.random.default_rng(2).integers(0, len(index), _QUERIES)
    # As near to one of them as a good query is.
    noise_QD = np.random.default_rng(3).standard_normal((_QUERIES, bundle.manifest.embedding_dim), np.float32)
    queries_QD = embeddings.at(positions_Q) + 0.02 * noise_QD
    fetched = min(_FETCHED, index.candidates.limit)

    def candidates(queries_BD: Float32Array) -> object:
        return index.candidates.search(queries_BD, fetched, {}, None, 1.0)

    def search(queries_BD: Float32Array) -> object:
        return index.search(queries_BD, TOP_K)

    found = {}
    for batch in (1, min(SERVED, largest_batch)):
        batches = [queries_QD[start : start + batch] for start in range(0, _QUERIES - batch, batch)]
        found[str(batch)] = {
            "candidates_ms": _call_ms(candidates, batches, seconds / 4),
            "search_ms": _call_ms(search, batches, seconds / 4),
        }
    rows_QK, _ = index.search(queries_QD[:64], TOP_K)
    gigabytes = 2 * len(index) * bundle.manifest.embedding_dim / 1e9
    return {
        "device": index.device,
        "why": index.device_why,
        "opened_s": round(opened_s, 2),
        "batches": found,
        "gb_read_for_one": round(gigabytes, 2),
        "gb_per_s_for_one": round(1000 * gigabytes / found["1"]["candidates_ms"]["p50"], 1),
        "nearest_is_first": round(float((rows_QK[:, 0] == embeddings.rows_N[positions_Q[:64]]).mean()), 3),
    }


def _rate(call: Callable[[int], object], sizes: list[int], seconds: float) -> float:
    """Images a second of `call(size)` for these sizes in turn, after two calls that do not count."""
    for size in sizes[:2]:
        call(size)
    images, number = 0, 0
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < seconds or number < len(sizes):
        size = sizes[number % len(sizes)]
        call(size)
        images, number = images + size, number + 1
    return round(images / took, 1)


def _call_ms(call: Callable[[Float32Array], object], batches: list[Float32Array], seconds: float) -> dict[str, float]:
    """Median and p99 in ms of `call(batch)` for these in turn, after three calls that do not count."""
    for batch in batches[:3]:
        call(batch)
    taken_ms: list[float] = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends or not taken_ms:
        call(batches[len(taken_ms) % len(batches)])
        taken_ms.append(1000 * (time.perf_counter() - began))
    p50, p99 = np.percentile(taken_ms, (50, 99)).round(3).tolist()
    return {"p50": p50, "p99": p99}


def main() -> None:
    """What the process does."""
    job = json.loads(Path(sys.argv[1]).read_bytes())
    bundle = Bundle.open(Path(job["bundle"]))
    measure = {"encoder": encoder_alone, "search": search_alone}[job["part"]]
    sys.stdout.write(json.dumps(measure(bundle, job["device"], job["seconds"], job["largest_batch"])))


if __name__ == "__main__":
    main()
