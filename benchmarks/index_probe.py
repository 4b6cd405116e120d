"""A process that opens a bundle as a service does and searches it. Its memory is not affected by other work.

`python -m benchmarks.index_probe BUNDLE QUERIES.npz` prints its figures as a line of JSON. For each line on its
standard input it then runs all queries again and prints its memory, so several processes can be measured side by side.
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
from typing import Any

import numpy as np

from benchmarks.measure import percentiles_ms
from core.runtime import faiss
from index.autotune import K
from index.bundle import Bundle

_BATCH = 64


def probe(bundle_path: Path, query_file: Path) -> tuple[dict[str, Any], Callable[[], dict[str, float]]]:
    """Return time to the first answer, latency on one thread, recall@10 and memory, and a function that runs all
    queries again and returns the memory then."""
    arrays = np.load(query_file)
    queries_QD, truth_QK = arrays["queries"], arrays["truth"]
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
    single = percentiles_ms(lambda i: index.search(queries_QD[i % count][None], K), repeats=1000, warm_up=50)
    batched = percentiles_ms(lambda i: index.search(np.roll(queries_QD, i, 0)[:_BATCH], K), repeats=20, warm_up=2)
    figures = {
        "checked_s": round(checked_s, 3),
        "ready_s": round(ready_s, 3),
        "recall_at_10": round(overlap(found_QK, truth_QK), 4),
        "single": single,
        "batch_64_queries_per_s": round(1000 * min(_BATCH, count) / batched["p50_ms"], 1),
        "memory_mb": _memory_mb(),
    }

    def search_again() -> dict[str, float]:
        index.search(queries_QD, K)
        return _memory_mb()

    return figures, search_again


def overlap(found_QK: np.ndarray[Any, Any], truth_QK: np.ndarray[Any, Any]) -> float:
    """Return the share of the true nearest that were found."""
    shares = [len(np.intersect1d(found, truth)) / len(truth) for found, truth in zip(found_QK, truth_QK, strict=True)]
    return float(np.mean(shares))


def _memory_mb() -> dict[str, float]:
    """Return this process's own memory, that of mapped files, and its share of memory that several processes map."""
    status = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    kinds = {"own": "RssAnon", "mapped": "RssFile", "share": "Pss"}
    found = {kind: re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for kind, name in kinds.items()}
    return {kind: round(int(match[1]) / 1024, 1) for kind, match in found.items() if match is not None}


@contextmanager
def probing(bundle_path: Path, query_file: Path) -> Iterator[subprocess.Popen[str]]:
    """Start such a process, and kill it at the end of the block."""
    command = [sys.executable, "-m", "benchmarks.index_probe", str(bundle_path), str(query_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_reply(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next line of a probing process. Raise `RuntimeError` if it has ended."""
    assert process.stdout is not None, "it is a pipe"
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that opens the bundle ended with {process.wait()}")
    reply: dict[str, Any] = json.loads(line)
    return reply


def memory_after_searching(process: subprocess.Popen[str]) -> dict[str, float]:
    """Let a probing process run all queries again, and return its memory."""
    assert process.stdin is not None, "it is a pipe"
    process.stdin.write("\n")
    process.stdin.flush()
    return read_reply(process)


def main() -> None:
    figures, search_again = probe(Path(sys.argv[1]), Path(sys.argv[2]))
    print(json.dumps(figures), flush=True)  # noqa: T201 - the replies of this process
    for _ in sys.stdin:
        print(json.dumps(search_again()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
