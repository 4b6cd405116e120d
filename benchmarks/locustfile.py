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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from urllib3 import encode_multipart_formdata

HOT_IMAGES = 16  # few enough for a cache
BATCH_IMAGES = 8
DRAIN_S = 30  # how long a stopped run waits for outstanding responses
IN_TIME_MS = 1000  # later answers are useless to a waiting person
KEPT_UP_SHARE = 0.95  # of the offered requests; a service that answers fewer in time is past its knee
SETTLING_SHARE = 0.3  # of a step, at its start, that does not count
REFUSED = "refused"  # the name of requests that get 429

PHOTOGRAPH = Path(__file__).with_name("photograph.jpg").read_bytes()  # 1280x960
_numbers = itertools.count(random.SystemRandom().getrandbits(40))
_outstanding = Group()  # of requests; they may outlive their user


@dataclass(kw_only=True)
class Step:
    """`length_s` seconds of constant offered load, `rate` requests per second, and the outcome of its requests."""

    rate: float
    length_s: float
    started_s: float = 0.0  # Unix time
    answered_ms: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    def add(self, sent_s: float, took_ms: float, *, refused: bool = False, failed: bool = False) -> None:
        """Count a request, unless it was sent while the load settled."""
        if SETTLING_SHARE * self.length_s <= sent_s - self.started_s < self.length_s:
            self.refused += refused
            self.failed += failed
            if not (refused or failed):
                self.answered_ms.append(took_ms)

    def figures(self) -> dict[str, Any]:
        """Return rates per second, latency percentiles of answered requests, and shares of refused and failed ones."""
        ordered_ms = sorted(self.answered_ms)
        answered = len(ordered_ms)
        requests = answered + self.refused + self.failed
        in_time = sum(took_ms <= IN_TIME_MS for took_ms in ordered_ms)
        counted_s = self.length_s * (1 - SETTLING_SHARE)
        percentiles = {n: ordered_ms[math.ceil(n / 100 * answered) - 1] if ordered_ms else None for n in (50, 99)}
        return {
            "planned_per_s": round(self.rate, 2),
            "offered_per_s": round(requests / counted_s, 2),
            "answered_per_s": round(answered / counted_s, 2),
            "in_time_per_s": round(in_time / counted_s, 2),
            **{f"p{n}_ms": took_ms and round(took_ms, 1) for n, took_ms in percentiles.items()},
            "refused_share": round(self.refused / max(requests, 1), 4),
            "failed_share": round(self.failed / max(requests, 1), 4),
            "kept_up": requests > 0 and in_time >= KEPT_UP_SHARE * requests,
        }


# The rate and the length in seconds of each step, by the options. A soak has steps of a minute.
SHAPES: dict[str, Callable[[Namespace], list[tuple[float, float]]]] = {
    "ramp": lambda options: [(options.rate * options.growth**number, options.step_s) for number in range(24)],
    "steady": lambda options: [(options.rate, 60 * options.minutes)],
    "spike": lambda options: [(options.rate * times, options.step_s) for times in (1, 8, 1, 1)],
    "soak": lambda options: [(options.rate, min(60.0, 60 * options.minutes))] * math.ceil(options.minutes),
}


class Shape(LoadTestShape):
    """The offered load over time. A ramp ends past the knee."""

    planned: ClassVar[list[Step]] = []
    started: ClassVar[list[Step]] = []

    def reset_time(self) -> None:
        """Begin a run. Locust's web page can start several in one process."""
        super().reset_time()
        options = self._options()
        self.planned[:] = [Step(rate=rate, length_s=length_s) for rate, length_s in SHAPES[options.shape](options)]
        self.started.clear()

    def tick(self) -> tuple[int, float] | None:
        if self.get_run_time() >= sum(step.length_s for step in self.started):
            past_knee = bool(self.started) and not self.started[-1].figures()["kept_up"]
            if not self.planned or (past_knee and self._options().shape == "ramp"):
                return None
            self.started.append(self.planned.pop(0))
            self.started[-1].started_s = time.time()
        users = max(1, round(self.started[-1].rate))
        return users, max(users, self.get_current_user_count())  # the second number changes all users at once

    def _options(self) -> Namespace:
        assert self.runner is not None
        options: Namespace | None = self.runner.environment.parsed_options
        assert options is not None, "the locust command runs this file"
        return options


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
            if response.status_code == 429:
                response.request_meta["name"] = REFUSED
                response.success()
            elif response.status_code in expected_statuses:
                response.success()
            else:
                response.failure(str(response.status_code or response.error))


def cold_image() -> bytes:
    """Return bytes that no cache has seen. A decoder ignores the number after the end of the image."""
    return PHOTOGRAPH + next(_numbers).to_bytes(8, "big")


class Cold(Arrivals):
    """Images never seen before. Each takes a pass of the encoder."""

    kind, weight = "cold", 10

    def request(self) -> None:
        self.post("/recognize", cold_image(), "image/jpeg")


class Hot(Arrivals):
    """A few images again and again. The cache answers."""

    kind, weight = "hot", 4

    def request(self) -> None:
        self.post("/recognize", PHOTOGRAPH + random.randrange(HOT_IMAGES).to_bytes(1, "big"), "image/jpeg")


class Batch(Arrivals):
    """Several images per request."""

    kind, weight = "batch", 1

    def request(self) -> None:
        images = [("image", ("i.jpg", cold_image(), "image/jpeg")) for _ in range(BATCH_IMAGES)]
        self.post("/recognize/batch", *encode_multipart_formdata(images))


class Hostile(Arrivals):
    """Invalid requests. Each must get a 4xx quickly."""

    kind, weight = "hostile", 1

    def request(self) -> None:
        body, content_type = random.choice(
            [
                (b"", "image/jpeg"),
                (PHOTOGRAPH[: len(PHOTOGRAPH) // 3], "image/jpeg"),
                (os.urandom(2000), "image/png"),
                (b"not an image", "text/plain"),
                (b'{"image": {"base64": "%%%"}}', "application/json"),
            ]
        )
        self.post("/recognize", body, content_type, expected_statuses=(400, 415, 422))


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("offered load")
    group.add_argument("--shape", choices=SHAPES, default="steady", help="How the offered load changes over time.")
    group.add_argument("--rate", type=float, default=20.0, help="Requests per second; the first rate of a ramp.")
    group.add_argument("--step-s", type=float, default=10.0, help="Length in seconds of a step of ramp and spike.")
    group.add_argument("--minutes", type=float, default=1.0, help="Length of steady and soak in minutes.")
    group.add_argument("--growth", type=float, default=1.35, help="Factor between the steps of a ramp.")
    group.add_argument("--max-p99-ms", type=float, default=math.inf, help="Fail if the p99 of answers is above this.")
    group.add_argument("--max-failed", type=float, default=0.0, help="Fail if more than this share of requests fails.")
    group.add_argument("--max-refused", type=float, default=1.0, help="Fail if more than this share gets 429.")
    group.add_argument("--steps", default="", help="Write the figures of each step to this JSON file.")


@events.request.add_listener
def _count(name: str, response_time: float, exception: Exception | None, start_time: float, **_: Any) -> None:
    """Count a request in the step in which it was sent."""
    for step in Shape.started:
        step.add(start_time, response_time, refused=name == REFUSED, failed=exception is not None)


@events.test_stop.add_listener
def _drain(**_: Any) -> None:
    _outstanding.join(timeout=DRAIN_S)


@events.quitting.add_listener
def _check_limits(environment: Environment, **_: Any) -> None:
    """Write the steps, and set exit code 1 if a limit was exceeded."""
    options, steps = environment.parsed_options, Shape.started
    assert options is not None
    if options.steps:
        Path(options.steps).write_text(json.dumps([step.figures() for step in steps], indent=1))
    whole = Step(rate=options.rate, length_s=sum(step.length_s for step in steps) or 1.0)
    for step in steps:
        whole.answered_ms += step.answered_ms
        whole.refused += step.refused
        whole.failed += step.failed
    figures = whole.figures()
    limits = {"p99_ms": options.max_p99_ms, "failed_share": options.max_failed, "refused_share": options.max_refused}
    exceeded = [
        f"{key} {figures[key]} is above {limit}" for key, limit in limits.items() if (figures[key] or 0) > limit
    ]
    if not whole.answered_ms:
        exceeded.append("no request was answered")
    for line in exceeded:
        print(f"threshold: {line}")  # noqa: T201 - Locust reports on standard output
    environment.process_exit_code = 1 if exceeded else 0
