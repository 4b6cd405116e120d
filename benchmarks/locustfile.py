"""Load on a service, open loop: `locust -f benchmarks/locustfile.py --host URL --headless --shape steady --rate 50`.

A user of this file is one arrival a second (Poisson), whatever the answers take: the number of users is the offered
load in requests a second, and a service that slows down is asked no less often. Name the kinds of traffic to mix on the
command line (`Cold`, `Hot`, `Batch`, `Hostile`), or all take part.

The run fails (exit code 1) past `--max-p99-ms` or `--max-failed`. A refusal by the limiter (429) is counted apart from
failures and has its own bound, `--max-refused`; `--steps FILE` keeps the figures of each step of the shape.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
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
from locust.runners import WorkerRunner

# Found wherever the folder `benchmarks` lies, as in a container that has Locust and nothing else of the project's.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.load_steps import SHAPES, Plan, Step, plan_of

IMAGES = 16  # that a cache may hold
BATCH_IMAGES = 8
PENDING_S = 30  # how long a stopped run waits for answers that are still out

PHOTOGRAPH = Path(__file__).with_name("photograph.jpg").read_bytes()  # 1280x960
_pending = Group()  # requests that are out; one group, so that a user may go while they are
_number = itertools.count(random.SystemRandom().getrandbits(40))


def bust_cache() -> bytes:
    """The picture in bytes that no cache has seen: a decoder stops before what follows a JPEG's end."""
    return PHOTOGRAPH + next(_number).to_bytes(8, "big")


def one_of_a_few() -> bytes:
    """The picture in bytes that come again and again."""
    return PHOTOGRAPH + random.randrange(IMAGES).to_bytes(1, "big")


class Arrivals(FastHttpUser):
    """One arrival a second on average, each in a greenlet of its own, so that no answer is waited for."""

    abstract = True
    kind: ClassVar[str]
    client_pool = HTTPClientPool(concurrency=4096)
    network_timeout = 60.0

    def wait_time(self) -> float:
        return random.expovariate(1.0)

    @task
    def arrive(self) -> None:
        _pending.spawn(self.ask)

    def ask(self) -> None:
        raise NotImplementedError

    def send(self, path: str, *, expect: tuple[int, ...] = (200,), **request: Any) -> None:
        """POST, told apart as answered, refused (429) and failed."""
        with self.client.post(path, name=self.kind, catch_response=True, **request) as response:
            if response.status_code in expect:
                response.success()
            elif response.status_code == 429:
                response.failure("refused: 429")
            else:
                reason = response.error if response.status_code == 0 else response.status_code
                response.failure(f"failed: {reason!r}")


class Cold(Arrivals):
    """Images never seen before: every answer costs a pass of the encoder."""

    kind, weight = "cold", 10

    def ask(self) -> None:
        self.send("/recognize", data=bust_cache(), headers={"Content-Type": "image/jpeg"})


class Hot(Arrivals):
    """A few images again and again: answers from the cache."""

    kind, weight = "hot", 4

    def ask(self) -> None:
        self.send("/recognize", data=one_of_a_few(), headers={"Content-Type": "image/jpeg"})


class Batch(Arrivals):
    """Several images in a request."""

    kind, weight = "batch", 1

    def ask(self) -> None:
        boundary = f"--------{next(_number):x}"
        parts = b"".join(
            b'--%b\r\nContent-Disposition: form-data; name="image"; filename="i.jpg"\r\n' % boundary.encode()
            + b"Content-Type: image/jpeg\r\n\r\n%b\r\n" % bust_cache()
            for _ in range(BATCH_IMAGES)
        )
        self.send(
            "/recognize/batch",
            data=parts + b"--%b--\r\n" % boundary.encode(),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )


class Hostile(Arrivals):
    """Bodies that no service likes: each must get its 4xx, and soon."""

    kind, weight = "hostile", 1

    def ask(self) -> None:
        photo = one_of_a_few()
        body, media_type = random.choice(
            [
                (b"", "image/jpeg"),
                (photo[: len(photo) // 3], "image/jpeg"),
                (os.urandom(2000), "image/png"),
                (b"not an image", "text/plain"),
                (b'{"image": {"base64": "%%%"}}', "application/json"),
                (photo[:200] + os.urandom(500), "image/webp"),
            ]
        )
        self.send("/recognize", expect=(400, 415, 422), data=body, headers={"Content-Type": media_type})


class Offered(LoadTestShape):
    """The offered load over time, as `--shape` and its options plan it; a run stops early past the knee of a ramp."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: Plan | None = None

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        if self.plan is None:
            self.plan = plan_of(_given(self.runner.environment))
        step = self.plan.at(self.get_run_time())
        if step is None or (self.plan.stops_past_knee and _run.is_past_knee(step)):
            return None
        _run.enter(step)
        # All at once, up and down: the shape alone says how load grows and falls.
        return (step.users, max(step.users, self.get_current_user_count()))


@dataclass
class _Run:
    """What happened in each step, by the step in which a request was sent."""

    steps: list[Step] = field(default_factory=list)
    started: list[float] = field(default_factory=list)

    def enter(self, step: Step) -> None:
        if not self.steps or self.steps[-1] is not step:
            self.steps.append(step)
            self.started.append(time.time())

    def note(self, sent_at: float, kind: str, took_ms: float, failure: str | None) -> None:
        for step, started in zip(reversed(self.steps), reversed(self.started), strict=True):
            if sent_at >= started:
                step.note(kind, sent_at - started, took_ms, failure)
                return

    def is_past_knee(self, now: Step) -> bool:
        finished = [step for step in self.steps if step is not now]
        return bool(finished) and not finished[-1].kept_up()


_run = _Run()


def _given(environment: Environment) -> Namespace:
    assert environment.parsed_options is not None, "this file is run by the locust command"
    options: Namespace = environment.parsed_options
    return options


@events.init_command_line_parser.add_listener
def _options(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("offered load")
    group.add_argument("--shape", choices=SHAPES, default="steady", help="How the offered load goes over time.")
    group.add_argument("--rate", type=float, default=20.0, help="Requests a second; a ramp starts with it.")
    group.add_argument("--step-s", type=float, default=10.0, help="Length of a step in seconds.")
    group.add_argument("--minutes", type=float, default=1.0, help="Length of steady and soak in minutes.")
    group.add_argument("--growth", type=float, default=1.35, help="A ramp's next step, as a multiple of the last.")
    group.add_argument("--spike", type=float, default=8.0, help="Height of a spike, as a multiple of the rate.")
    group.add_argument("--max-p99-ms", type=float, default=None, help="Fail the run past this p99 of answers.")
    group.add_argument("--max-failed", type=float, default=0.0, help="Fail past this share of failed requests.")
    group.add_argument("--max-refused", type=float, default=1.0, help="Fail past this share of 429s.")
    group.add_argument("--steps", default="", help="JSON file for the figures of each step.")


@events.request.add_listener
def _note(
    name: str,
    response_time: float,
    exception: Exception | None = None,
    start_time: float = 0.0,
    **_: Any,
) -> None:
    _run.note(start_time, name, response_time, None if exception is None else str(exception))


@events.test_stop.add_listener
def _await_answers(**_: Any) -> None:
    _pending.join(timeout=PENDING_S)


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    """Write the steps; exit code 1 where a bound was passed, saying which."""
    if isinstance(environment.runner, WorkerRunner):
        return
    options = _given(environment)
    figures = [step.figures() for step in _run.steps]
    if options.steps:
        Path(options.steps).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    whole = Step(rate=0.0, length_s=sum(step.length_s for step in _run.steps))
    for step in _run.steps:
        whole.merge(step)
    total = whole.figures()
    broken = [
        f"{what} {total[key]} is past {bound}"
        for what, key, bound in (
            ("p99 (ms)", "p99_ms", options.max_p99_ms),
            ("the share of failed requests", "failed_share", options.max_failed),
            ("the share of refused requests", "refused_share", options.max_refused),
        )
        if bound is not None and total[key] is not None and total[key] > bound
    ]
    if not total["requests"]:
        broken.append("no request was answered at all")
    for line in broken:
        print(f"threshold: {line}")  # noqa: T201 - locust's own way of reporting
    environment.process_exit_code = 1 if broken else 0
