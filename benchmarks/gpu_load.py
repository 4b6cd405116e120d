"""Services on a GPU under all the load that they can do, and what each of them, their machine and the GPU do meanwhile.

Several services on one GPU have each a copy of encoder and index, and a share of the cores.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from benchmarks.closed_loop import Job, run_jobs
from benchmarks.server import ANSWERED, scrape_metrics, service_process, thread_flags

TARGET = "/recognize?top_k=5"
WARM_UP_S = 2.0
STAGES = ("decode", "queue", "encode", "search")
_GPU_ASKED = "utilization.gpu,memory.used,power.draw"
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the services are run and asked."""

    bundle: Path
    work: Path
    device: str
    generator_cores: Sequence[int]
    service_cores: Sequence[int]
    connections: int
    max_batch: int
    seconds: float
    start_timeout_s: float


@dataclass(frozen=True, kw_only=True)
class Service:
    url: str
    pid: int
    cores: int


@contextmanager
def services(load: Load, count: int) -> Iterator[list[Service]]:
    """So many services, started side by side, each on cores of its own as far as there are enough."""
    shares = dealt(load.service_cores, count)
    contexts = [
        service_process(
            load.bundle, "--cache", "off", "--device", load.device, "--max-batch", str(load.max_batch),
            *thread_flags(len(cores)), "--log-level", "warning", cores=cores, start_timeout_s=load.start_timeout_s,
        )
        for cores in shares
    ]  # fmt: skip
    with ExitStack() as stack:
        with ThreadPoolExecutor(count) as pool:
            started = list(pool.map(stack.enter_context, contexts))
        yield [
            Service(url=url, pid=process.pid, cores=len(cores))
            for (process, url), cores in zip(started, shares, strict=True)
        ]


def dealt(cores: Sequence[int], parts: int) -> list[set[int]]:
    """Cores in so many parts; a part for which none is left has them all."""
    return [set(part.tolist()) or set(cores) for part in np.array_split(np.array(cores), parts)]


def saturate(load: Load, asked: Sequence[Service], images: list[str]) -> dict[str, Any]:
    """Ask as much as they can do, from a process on each of the generator's cores: images a second and latency of all
    of them together, and what was busy."""
    generators = max(len(load.generator_cores), len(asked))
    warm_up_s = min(WARM_UP_S, load.seconds)
    jobs = [
        Job(
            url=asked[number % len(asked)].url + TARGET, images=images, field=None,
            connections=max(1, load.connections // generators), warm_up_s=warm_up_s, seconds=load.seconds,
            tells_each=True,
        )
        for number in range(generators)
    ]  # fmt: skip
    cores = [{load.generator_cores[number % len(load.generator_cores)]} for number in range(generators)]
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(run_jobs, jobs, load.work, cores)
        time.sleep(warm_up_s)
        before = [_looked_at(service) for service in asked]
        with GpuWatch() as watch:
            time.sleep(load.seconds)  # they began later than this clock, so they are all asking when it has run down
        after = [_looked_at(service) for service in asked]
        told = asking.result()
    taken_ms = np.concatenate([each["taken_ms"] for each in told])
    failures: Counter[str] = Counter()
    for each in told:
        failures.update(each["failures"])
    p50, p99 = np.percentile(taken_ms, (50, 99)).round(2).tolist() if len(taken_ms) else (None, None)
    return {
        "per_s": round(sum(each["per_s"] for each in told), 1),
        "p50_ms": p50,
        "p99_ms": p99,
        "failures": dict(failures),
        "connections": sum(job.connections for job in jobs),
        "generator_busy": max(each["generator_busy"] for each in told),
        **busy(before, after, sum(service.cores for service in asked)),
        "gpu": watch.told(),
    }


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a service has done so far: by the clock, what it tells Prometheus, seconds of the processor by thread."""

    at_s: float
    metrics: Mapping[str, float]
    main_thread_s: float
    other_threads_s: Mapping[int, float]


def busy(before: Sequence[Look], after: Sequence[Look], cores: int) -> dict[str, Any]:
    """What services did between two looks: the processor's time for an image, the share of their cores that this is,
    how busy the thread that answers HTTP and the busiest of the others were, the engine, the mean batch and stage."""

    def total(name: str) -> float:
        return sum(
            new.metrics.get(name, 0.0) - old.metrics.get(name, 0.0) for old, new in zip(before, after, strict=True)
        )

    def mean(name: str, labels: str = "") -> float:
        return total(f"{name}_sum{labels}") / max(total(f"{name}_count{labels}"), 1)

    took_s = sum(new.at_s - old.at_s for old, new in zip(before, after, strict=True))  # of all services
    cpu_s, images, batches = (
        total(name) for name in ("process_cpu_seconds_total", ANSWERED, "wikiclip_batch_images_count")
    )
    stages_ms = {stage: 1000 * mean("wikiclip_stage_seconds", f'{{stage="{stage}"}}') for stage in STAGES}
    others_s = [
        max(
            (since - old.other_threads_s.get(thread, 0.0) for thread, since in new.other_threads_s.items()), default=0.0
        )
        for old, new in zip(before, after, strict=True)
    ]
    main_s = [new.main_thread_s - old.main_thread_s for old, new in zip(before, after, strict=True)]
    # An image is told the time of its whole batch; where batches differ, this is more than it was.
    engine_s = batches * (stages_ms["encode"] + stages_ms["search"]) / 1000
    return {
        "cpu_ms_per_image": round(1000 * cpu_s / max(images, 1), 3),
        "cores_busy": round(cpu_s / (took_s / len(before)) / cores, 3),
        "http_thread_busy": round(sum(main_s) / took_s, 3),
        "busiest_other_thread": round(sum(others_s) / took_s, 3),
        "engine_busy": round(min(engine_s / took_s, 1.0), 3),
        "batch_images": round(mean("wikiclip_batch_images"), 2),
        "stages_ms": {stage: round(value, 3) for stage, value in stages_ms.items()},
    }


def _looked_at(service: Service) -> Look:
    threads = _thread_seconds(service.pid)
    return Look(
        at_s=time.monotonic(),
        metrics=scrape_metrics(service.url),
        main_thread_s=threads.pop(service.pid, 0.0),
        other_threads_s=threads,
    )


def _thread_seconds(pid: int) -> dict[int, float]:
    """Seconds of the processor that each thread of a process has used, by Linux's number for it."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue  # it has just ended
        found[int(task.name)] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found


class GpuWatch:
    """What nvidia-smi says while the block runs, again and again if it does, of the first GPU, four times a second."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said = ""

    def __enter__(self) -> Self:
        command = ["nvidia-smi", f"--query-gpu={_GPU_ASKED}", "--format=csv,noheader,nounits", "--id=0", "-lms", "250"]
        with suppress(FileNotFoundError):  # no GPU of NVIDIA's, no figures
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._said += self._process.communicate()[0]

    def told(self) -> dict[str, float] | None:
        """Median utilisation (the share of time in which anything ran), the most memory, median power; None without."""
        return gpu_told(self._said)


def gpu_told(said: str) -> dict[str, float] | None:
    rows = []
    for line in said.splitlines():
        try:
            row = [float(part) for part in line.split(",")]
        except ValueError:
            continue  # "[N/A]", and a last line that was cut off
        if len(row) == len(_GPU_ASKED.split(",")):
            rows.append(row)
    if not rows:
        return None
    utilisation, memory, power = np.array(rows).T
    return {
        "utilisation": round(float(np.median(utilisation)) / 100, 3),
        "memory_mib": float(memory.max()),
        "power_w": round(float(np.median(power)), 1),
        "samples": len(rows),
    }


def one_at_a_time(service: Service, images: Sequence[str], seconds: float) -> dict[str, Any]:
    """p50 and p99 of one request after the other, and the median of each stage by the header `Server-Timing`."""
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
    bodies = [Path(path).read_bytes() for path in images]
    taken_ms: list[float] = []
    stages: dict[str, list[float]] = {}
    warm, ends = len(bodies), time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < ends or number <= warm:
        began = time.perf_counter()
        connection.request("POST", TARGET, bodies[number % len(bodies)], {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        answer.read()
        took_ms = 1000 * (time.perf_counter() - began)
        if answer.status != http.client.OK:
            raise RuntimeError(f"a request was answered with {answer.status}")
        number += 1
        if number > warm:
            taken_ms.append(took_ms)
            for stage, value_ms in timings_of(answer.headers["Server-Timing"]).items():
                stages.setdefault(stage, []).append(value_ms)
    connection.close()
    p50, p99 = np.percentile(taken_ms, (50, 99)).round(3).tolist()
    medians = {stage: round(float(np.median(values)), 3) for stage, values in stages.items()}
    return {"p50_ms": p50, "p99_ms": p99, "requests": len(taken_ms), "stages_ms": medians}


def timings_of(header: str) -> dict[str, float]:
    """Milliseconds by name, of `decode;dur=1.2, queue;dur=0.1`."""
    parts = (part.strip().partition(";dur=") for part in header.split(","))
    return {name: float(value) for name, _, value in parts}
