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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gevent.pool import Group
from geventhttpclient.client import HTTPClientPool
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.stats import RequestStats

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
    """`length_s` seconds of constant offered load, `rate` requests per second, and Locust's statistics by outcome."""

    rate: float
    length_s: float
    started_s: float = 0.0  # Unix time
    stats: RequestStats = field(default_factory=RequestStats)

    def add(self, sent_s: float, took_ms: float, failure: str | None) -> None:
        """Count a request, unless it was sent while the load settled."""
        if SETTLING_SHARE * self.length_s <= sent_s - self.started_s < self.length_s:
            outcome = "answered" if failure is None else "refused" if failure.startswith("refused") else "failed"
            self.stats.log_request("POST", outcome, round(took_ms), 0)

    def figures(self) -> dict[str, Any]:
        """Return rates per second, latency percentiles of answered requests, and shares of refused and failed ones."""
        answered, refused, failed = (self.stats.get(outcome, "POST") for outcome in ("answered", "refused", "failed"))
        requests = self.stats.total.num_requests
        in_time = sum(count for took_ms, count in answered.response_times.items() if took_ms <= IN_TIME_MS)
        counted_s = self.length_s * (1 - SETTLING_SHARE)
        return {
            "planned_per_s": round(self.rate, 2),
            "offered_per_s": round(requests / counted_s, 2),
            "answered_per_s": round(answered.num_requests / counted_s, 2),
            "in_time_per_s": round(in_time / counted_s, 2),
            **{f"p{n}_ms": answered.get_response_time_percentile(n / 100) or None for n in (50, 90, 99)},
            "refused_share": round(refused.num_requests / max(requests, 1), 4),
            "failed_share": round(failed.num_requests / max(requests, 1), 4),
            "kept_up": requests > 0 and in_time >= KEPT_UP_SHARE * requests,
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


class Shape(LoadTestShape):
    """The offered load over time. A ramp ends past the knee."""

    planned: ClassVar[list[Step]] = []
    started: ClassVar[list[Step]] = []

    def reset_time(self) -> None:
        """Begin a run. Locust's web page can start several in one process."""
        super().reset_time()
        assert self.runner is not None
        self.planned[:] = plan_steps(_options(self.runner.environment))
        self.started.clear()

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        if self.get_run_time() >= sum(step.length_s for step in self.started):
            past_knee = bool(self.started) and not self.started[-1].figures()["kept_up"]
            if not self.planned or (past_knee and _options(self.runner.environment).shape == "ramp"):
                return None
            self.started.append(self.planned.pop(0))
            self.started[-1].started_s = time.time()
        users = max(1, round(self.started[-1].rate))
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
            else:
                outcome = "refused" if response.status_code == 429 else "failed"
                response.failure(f"{outcome}: {response.status_code or response.error!r}")


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
        body, content_type = random.choice(
            [
                (b"", "image/jpeg"),
                (PHOTOGRAPH[: len(PHOTOGRAPH) // 3], "image/jpeg"),
                (os.urandom(2000), "image/png"),
                (b"not an image", "text/plain"),
                (b'{"image": {"base64": "%%%"}}', "application/json"),
                (PHOTOGRAPH[:200] + os.urandom(500), "image/webp"),
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
def _count(response_time: float, exception: Exception | None = None, start_time: float = 0.0, **_: Any) -> None:
    """Count a request in the step in which it was sent."""
    for step in Shape.started:
        step.add(start_time, response_time, None if exception is None else str(exception))


@events.test_stop.add_listener
def _drain(**_: Any) -> None:
    _outstanding.join(timeout=DRAIN_S)


@events.quitting.add_listener
def _check_limits(environment: Environment, **_: Any) -> None:
    """Write the steps, and set exit code 1 if a limit was exceeded."""
    options = _options(environment)
    if options.steps:
        Path(options.steps).write_text(json.dumps([step.figures() for step in Shape.started], indent=1))
    total = Step(rate=options.rate, length_s=1.0)
    for entry in (entry for step in Shape.started for entry in step.stats.entries.values()):
        total.stats.get(entry.name, entry.method).extend(entry)
        total.stats.total.extend(entry)
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
    if figures["p99_ms"] is None:
        exceeded.append("no request was answered")
    for line in exceeded:
        print(f"threshold: {line}")  # noqa: T201 - Locust reports on standard output
    environment.process_exit_code = 1 if exceeded else 0
