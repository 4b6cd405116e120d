"""One process that opens a bundle as a service does, and searches it: how soon, how fast, how well, in what memory.

`python -m benchmarks.index_probe BUNDLE QUERIES.npz` prints one JSON object a line: the first when it is done, and for
each line on its standard input, after all queries once more, what memory it holds, so that several can be looked at
side by side.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from core.runtime import faiss

# isort: split
import numpy as np

from benchmarks.measure import percentiles_ms
from index.bundle import Bundle
from index.tune import K

_REPEATS = 1000
_BATCH = 64


def probe(bundle_path: Path, queries_path: Path) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Seconds until the first answer, milliseconds of one query on one thread, recall@10, and memory; and a call that
    asks all queries once more and gives the memory then."""
    given = np.load(queries_path)
    queries_QD, truth_QK = given["queries"], given["truth"]
    faiss.omp_set_num_threads(1)
    started = time.perf_counter()
    bundle = Bundle.open(bundle_path)
    checked_s = time.perf_counter() - started
    index, store = bundle.index(), bundle.store()
    rows_BK, _ = index.search(queries_QD[:1], K)
    store.by_rows(rows_BK[0].tolist())
    ready_s = time.perf_counter() - started
    found_QK = np.concatenate([index.search(query_D[None], K)[0] for query_D in queries_QD])
    count = len(queries_QD)
    single = percentiles_ms(lambda i: index.search(queries_QD[i % count][None], K), repeats=_REPEATS, warm_up=50)
    batched = percentiles_ms(lambda i: index.search(np.roll(queries_QD, i, 0)[:_BATCH], K), repeats=20, warm_up=2)
    outcome = {
        "checked_s": round(checked_s, 3),
        "ready_s": round(ready_s, 3),
        "recall_at_10": round(overlap(found_QK, truth_QK), 4),
        "single": single,
        "batch_64_queries_per_s": round(1000 * min(_BATCH, count) / batched["p50_ms"], 1),
        "memory_mb": memory_mb(),
    }

    def again() -> dict[str, float]:
        index.search(queries_QD, K)
        return memory_mb()

    return outcome, again


def overlap(found_QK: np.ndarray[Any, Any], truth_QK: np.ndarray[Any, Any]) -> float:
    """The share of the true nearest that were found."""
    shares = [len(np.intersect1d(found, truth)) / len(truth) for found, truth in zip(found_QK, truth_QK, strict=True)]
    return float(np.mean(shares))


def memory_mb() -> dict[str, float]:
    """Memory of this process in MB: its own, that of mapped files, and its share of all where mapped by several."""
    status = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    kinds = {"own": "RssAnon", "mapped": "RssFile", "share": "Pss"}
    found = {kind: re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for kind, name in kinds.items()}
    return {kind: round(int(match.group(1)) / 1024, 1) for kind, match in found.items() if match is not None}


@contextmanager
def probing(bundle_path: Path, queries_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that does this; it ends with the block."""
    command = [sys.executable, "-m", "benchmarks.index_probe", str(bundle_path), str(queries_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next thing that a probing process says. Raises `RuntimeError` where it ended instead."""
    stream: IO[str] | None = process.stdout
    line = "" if stream is None else stream.readline()
    if not line:
        raise RuntimeError(f"the process that opens the bundle ended with {process.wait()}")
    said: dict[str, Any] = json.loads(line)
    return said


def main() -> None:
    outcome, again = probe(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps(outcome), flush=True)  # noqa: T201 - this is what it is for
    for _ in sys.stdin:
        print(json.dumps(again()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
