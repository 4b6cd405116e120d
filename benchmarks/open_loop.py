"""Requests at times that do not depend on the answers, from a process of its own.

`python -m benchmarks.open_loop JOB.json` prints, as JSON, what became of each request: when it was sent, how long it
took, and its status (0 where the connection failed).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.plain_http import HEAD_END, read_head, request_bytes

TIMEOUT_S = 60.0
MOST_BEHIND_S = 0.2  # of arrivals that are due


class Sent(NamedTuple):
    """`at_s` is counted from the start of the run."""

    at_s: float
    took_ms: float
    status: int
    retry_after: bool


def run_open_loop(
    url: str, images: Sequence[str], work: Path, cores: set[int], *, phases: Sequence[tuple[float, float]]
) -> list[Sent]:
    """POST the files, each time in bytes that no cache has seen, as Poisson arrivals: `phases` are pairs of requests a
    second and seconds."""
    path = work / "open_loop.json"
    path.write_text(json.dumps({"url": url, "images": list(images), "phases": list(phases)}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.open_loop", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
    os.sched_setaffinity(process.pid, cores)
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the load generator ended with exit code {process.returncode}; see its message above")
    return [Sent(*each) for each in json.loads(said)]


class _Connections:
    """Connections that are kept for the next request, as many as are needed at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes) -> tuple[int, bool]:
        """The status of the answer, and whether it says when to ask again."""
        while self._idle:
            kept = self._idle.pop()
            try:
                return await self._ask_on(*kept, request)
            except (OSError, asyncio.IncompleteReadError):
                continue  # the service closes those that were idle for a while
        return await self._ask_on(*await asyncio.open_connection(self._host, self._port), request)

    async def _ask_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> tuple[int, bool]:
        keep = False
        try:
            writer.write(request)
            answered = read_head((await reader.readuntil(HEAD_END)).removesuffix(HEAD_END))
            await reader.readexactly(answered.body_bytes)
            keep = answered.keeps_open
            return answered.status, answered.says_when
        finally:
            if keep:
                self._idle.append((reader, writer))
            else:
                writer.close()

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def _run(job: dict[str, Any]) -> list[Sent]:
    address, _, path = job["url"].removeprefix("http://").partition("/")
    host, port = address.split(":")
    images = [Path(each).read_bytes() for each in job["images"]]
    number = itertools.count(random.SystemRandom().getrandbits(40))
    sent: list[Sent] = []
    connections = _Connections(host, int(port))
    started = time.perf_counter()

    async def one() -> None:
        unique = next(number)
        body = images[unique % len(images)] + unique.to_bytes(8, "big")  # a decoder stops before it
        at = time.perf_counter()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, retry_after = await connections.ask(request_bytes(f"/{path}", "image/jpeg", body))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            status, retry_after = 0, False
        sent.append(Sent(at - started, 1000 * (time.perf_counter() - at), status, retry_after))

    async with asyncio.TaskGroup() as tasks:
        due = started
        ends = started
        for rate, seconds in job["phases"]:
            ends += seconds
            while (due := due + random.expovariate(rate)) < ends:
                if due < time.perf_counter() - MOST_BEHIND_S:
                    continue  # one core can offer no more: fewer are offered, and the phases stay as long as planned
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(one())
            due = ends
    connections.close()
    return sorted(sent)


def main() -> None:
    """What the process does."""
    sys.stdout.write(json.dumps(asyncio.run(_run(json.loads(Path(sys.argv[1]).read_bytes())))))


if __name__ == "__main__":
    main()
