"""Load on a service, open loop: `locust -f benchmarks/locustfile.py --host URL --headless --shape steady --rate 50`.

A user sends one request per second on average (Poisson arrivals) and does not wait for responses. The number of users
is therefore the offered load in requests per second, and a service that slows down is not asked less often. Name the
kinds of traffic on the command line (`Cold`, `Hot`, `Batch`, `Hostile`); without names all take part.

The run exits with 1 if the share of failed requests or the p99 exceeds `--max-failed` or `--max-p99-ms`. Responses with
429 are not failures; they have their own limit, `--max-refused`. `--steps FILE` writes the figures of each step of the
shape. This file needs Locust and `photograph.jpg`, nothing else.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, ClassVar

from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner

HOT_IMAGES = 16  # few enough for a cache
BATCH_IMAGES = 8
DRAIN_S = 30  # how long a stopped run waits for outstanding responses

SHAPES = ("ramp", "steady", "spike", "soak")
MAX_RAMP_STEPS = 24
IN_TIME_MS = 1000  # later answers are useless to a waiting person
KEPT_UP_SHARE = 0.95  # of the offered requests; a service that answers fewer in time is past its knee
SETTLING_SHARE = 0.3  # of a step, at its start, that does not count

PHOTOGRAPH = Path(__file__).with_name("photograph.jpg").read_bytes()  # 1280x960
_numbers = itertools.count(random.SystemRandom().getrandbits(40))
_outstanding = Group()  # of requests; they may outlive their user


# ---- steps of constant load ----


@dataclass(kw_only=True)
class Step:
    """`length_s` seconds of constant offered load, `rate` requests per second, and the outcome of the requests."""

    rate: float
    length_s: float
    started_s: float = 0.0  # Unix time
    latencies_ms: list[float] = field(default_factory=list)  # of answered requests
    failures: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, sent_s: float, took_ms: float, failure: str | None) -> None:
        """Count a request, unless it was sent while the load settled."""
        if not SETTLING_SHARE * self.length_s <= sent_s - self.started_s < self.length_s:
            return
        self.kinds[kind] += 1
        if failure is None:
            self.latencies_ms.append(took_ms)
        else:
            self.failures[failure] += 1

    def figures(self) -> dict[str, Any]:
        """Return rates per second, latency percentiles of answered requests, and shares of refused and failed ones."""
        requests = self.kinds.total()
        refused = sum(count for reason, count in self.failures.items() if reason.startswith("refused"))
        in_time = sum(took <= IN_TIME_MS for took in self.latencies_ms)
        counted_s = self.length_s * (1 - SETTLING_SHARE)
        values = self.latencies_ms * 2 if len(self.latencies_ms) == 1 else self.latencies_ms  # `quantiles` needs two
        percentiles = quantiles(values, n=100, method="inclusive") if values else None
        return {
            "planned_per_s": round(self.rate, 2),
            "offered_per_s": round(requests / counted_s, 2),
            "answered_per_s": round(len(self.latencies_ms) / counted_s, 2),
            "in_time_per_s": round(in_time / counted_s, 2),
            **{f"p{n}_ms": round(percentiles[n - 1], 2) if percentiles else None for n in (50, 90, 99)},
            "requests": requests,
            "refused_share": round(refused / requests, 4) if requests else 0.0,
            "failed_share": round((self.failures.total() - refused) / requests, 4) if requests else 0.0,
            "kept_up": requests > 0 and in_time >= KEPT_UP_SHARE * requests,
            "kinds": dict(sorted(self.kinds.items())),
            "failures": dict(sorted(self.failures.items())),
        }


def plan_steps(options: Namespace) -> list[Step]:
    """Return the steps of `--shape`: `ramp` grows, `steady` and `soak` are constant (a soak has steps of one minute),
    `spike` multiplies the rate for one step."""
    rates, length_s = [options.rate], options.step_s
    if options.shape == "ramp":
        rates = [options.rate * options.growth**number for number in range(MAX_RAMP_STEPS)]
    elif options.shape == "spike":
        rates = [options.rate, options.rate * options.spike, options.rate, options.rate]
    elif options.shape == "steady":
        length_s = 60 * options.minutes
    else:
        length_s = min(60.0, 60 * options.minutes)
        rates = [options.rate] * math.ceil(60 * options.minutes / length_s)
    return [Step(rate=rate, length_s=length_s) for rate in rates]


def step_at(steps: Sequence[Step], seconds: float) -> Step | None:
    """Return the step `seconds` after the start, or None after the last."""
    for step in steps:
        if seconds < step.length_s:
            return step
        seconds -= step.length_s
    return None


class Shape(LoadTestShape):
    """The offered load over time. A ramp ends past the knee."""

    planned: ClassVar[list[Step]] = []
    started: ClassVar[list[Step]] = []

    def reset_time(self) -> None:
        """Begin a run. Locust's web page can start several in one process."""
        super().reset_time()
        self.planned.clear()
        self.started.clear()

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        options = _options(self.runner.environment)
        if not self.planned:
            self.planned.extend(plan_steps(options))
        step = step_at(self.planned, self.get_run_time())
        if step is None:
            return None
        if not self.started or self.started[-1] is not step:
            if options.shape == "ramp" and self.started and not self.started[-1].figures()["kept_up"]:
                return None
            step.started_s = time.time()
            self.started.append(step)
        users = max(1, round(step.rate))
        return users, max(users, self.get_current_user_count())  # the second number changes all users at once


# ---- kinds of traffic ----


class Arrivals(FastHttpUser):
    """One request per second on average, each in a greenlet of its own."""

    abstract = True
    kind: ClassVar[str]
    client_pool = HTTPClientPool(concurrency=4096)
    network_timeout = 60.0

    def wait_time(self) -> float:
        return random.expovariate(1.0)

    @task
    def arrive(self) -> None:
        _outstanding.spawn(self.request)

    def request(self) -> None:
        raise NotImplementedError

    def post(self, path: str, data: Any, content_type: str, *, expected_statuses: tuple[int, ...] = (200,)) -> None:
        """POST, and count the response as answered, refused (429) or failed."""
        with self.client.post(
            path, data=data, headers={"Content-Type": content_type}, name=self.kind, catch_response=True
        ) as response:
            if response.status_code in expected_statuses:
                response.success()
            elif response.status_code == 429:
                response.failure("refused: 429")
            else:
                reason = response.error if response.status_code == 0 else response.status_code
                response.failure(f"failed: {reason!r}")


def cold_image() -> bytes:
    """Return bytes that no cache has seen. A decoder ignores the number after the end of the image."""
    return PHOTOGRAPH + next(_numbers).to_bytes(8, "big")


def hot_image() -> bytes:
    """Return one of a few images that repeat."""
    return PHOTOGRAPH + random.randrange(HOT_IMAGES).to_bytes(1, "big")


class Cold(Arrivals):
    """Images never seen before. Each takes a pass of the encoder."""

    kind, weight = "cold", 10

    def request(self) -> None:
        self.post("/recognize", cold_image(), "image/jpeg")


class Hot(Arrivals):
    """A few images again and again. The cache answers."""

    kind, weight = "hot", 4

    def request(self) -> None:
        self.post("/recognize", hot_image(), "image/jpeg")


class Batch(Arrivals):
    """Several images per request."""

    kind, weight = "batch", 1

    def request(self) -> None:
        boundary = f"--------{next(_numbers):x}"
        parts = b"".join(
            b'--%b\r\nContent-Disposition: form-data; name="image"; filename="i.jpg"\r\n' % boundary.encode()
            + b"Content-Type: image/jpeg\r\n\r\n%b\r\n" % cold_image()
            for _ in range(BATCH_IMAGES)
        )
        body = parts + b"--%b--\r\n" % boundary.encode()
        self.post("/recognize/batch", body, f"multipart/form-data; boundary={boundary}")


class Hostile(Arrivals):
    """Invalid requests. Each must get a 4xx quickly."""

    kind, weight = "hostile", 1

    def request(self) -> None:
        image = hot_image()
        body, content_type = random.choice(
            [
                (b"", "image/jpeg"),
                (image[: len(image) // 3], "image/jpeg"),
                (os.urandom(2000), "image/png"),
                (b"not an image", "text/plain"),
                (b'{"image": {"base64": "%%%"}}', "application/json"),
                (image[:200] + os.urandom(500), "image/webp"),
            ]
        )
        self.post("/recognize", body, content_type, expected_statuses=(400, 415, 422))


# ---- Locust's events ----


def _options(environment: Environment) -> Namespace:
    assert environment.parsed_options is not None, "the locust command runs this file"
    options: Namespace = environment.parsed_options
    return options


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("offered load")
    group.add_argument("--shape", choices=SHAPES, default="steady", help="How the offered load changes over time.")
    group.add_argument("--rate", type=float, default=20.0, help="Requests per second; the first rate of a ramp.")
    group.add_argument("--step-s", type=float, default=10.0, help="Length of a step in seconds.")
    group.add_argument("--minutes", type=float, default=1.0, help="Length of steady and soak in minutes.")
    group.add_argument("--growth", type=float, default=1.35, help="Factor between the steps of a ramp.")
    group.add_argument("--spike", type=float, default=8.0, help="Height of a spike as a multiple of the rate.")
    group.add_argument("--max-p99-ms", type=float, default=None, help="Fail if the p99 of answers is above this.")
    group.add_argument("--max-failed", type=float, default=0.0, help="Fail if more than this share of requests fails.")
    group.add_argument("--max-refused", type=float, default=1.0, help="Fail if more than this share gets 429.")
    group.add_argument("--steps", default="", help="Write the figures of each step to this JSON file.")


@events.request.add_listener
def _count(
    name: str, response_time: float, exception: Exception | None = None, start_time: float = 0.0, **_: Any
) -> None:
    """Count a request in the step in which it was sent."""
    for step in reversed(Shape.started):
        if start_time >= step.started_s:
            step.add(name, start_time, response_time, None if exception is None else str(exception))
            return


@events.test_stop.add_listener
def _drain(**_: Any) -> None:
    _outstanding.join(timeout=DRAIN_S)


@events.quitting.add_listener
def _check_limits(environment: Environment, **_: Any) -> None:
    """Write the steps, and set exit code 1 if a limit was exceeded."""
    if isinstance(environment.runner, WorkerRunner):
        return
    options = _options(environment)
    if options.steps:
        Path(options.steps).write_text(json.dumps([step.figures() for step in Shape.started], indent=1))
    total = Step(rate=0.0, length_s=sum(step.length_s for step in Shape.started) or 1.0)
    for step in Shape.started:
        total.latencies_ms += step.latencies_ms
        total.failures += step.failures
        total.kinds += step.kinds
    figures = total.figures()
    exceeded = [
        f"{name} {figures[key]} is above {limit}"
        for name, key, limit in (
            ("p99 (ms)", "p99_ms", options.max_p99_ms),
            ("the share of failed requests", "failed_share", options.max_failed),
            ("the share of refused requests", "refused_share", options.max_refused),
        )
        if limit is not None and figures[key] is not None and figures[key] > limit
    ]
    if not figures["requests"]:
        exceeded.append("no request was answered")
    for line in exceeded:
        print(f"threshold: {line}")  # noqa: T201 - Locust reports on standard output
    environment.process_exit_code = 1 if exceeded else 0
