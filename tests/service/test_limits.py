"""Admission and rate limits, on a fake clock and over HTTP, with and without Redis."""

from __future__ import annotations

import asyncio
import time

import pytest

from core.errors import TooManyRequests
from service.limits import Admission, Buckets, Rate, RateLimiter, client_name
from service.redis_link import RedisLink


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def work(admission, clock, *, images: int, each_s: float) -> None:
    """Admit one image after the other."""
    for _ in range(images):
        with admission.admit(1):
            clock.now_s += each_s


def test_admission_is_limited(clock):
    refused = []
    admission = Admission(3, on_refusal=refused.append, now=clock)
    with admission.admit(1):
        with pytest.raises(TooManyRequests), admission.admit(3):
            pass
        with admission.admit(2):
            assert admission.in_flight == 3
        assert admission.in_flight == 1
    assert admission.in_flight == 0
    assert refused == [3]


def test_a_failed_request_frees_its_place(clock):
    admission = Admission(1, now=clock)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), admission.admit(1):
            raise ZeroDivisionError
    assert admission.in_flight == 0


def test_the_limit_falls_with_the_throughput(clock):
    admission = Admission(256, minimum=4, deadline_s=10.0, now=clock)
    assert admission.room == 256  # no throughput known yet
    work(admission, clock, images=30, each_s=0.1)
    assert admission.room == pytest.approx(70, abs=1)  # 0.7 of the images of 10 s
    work(admission, clock, images=200, each_s=0.01)
    assert admission.room == 256
    work(admission, clock, images=12, each_s=1.0)
    assert admission.room == pytest.approx(7, abs=1)
    work(admission, clock, images=3, each_s=5.0)
    assert admission.room == 4  # the minimum


def test_idle_time_does_not_lower_the_throughput(clock):
    admission = Admission(256, minimum=4, deadline_s=10.0, now=clock)
    for _ in range(60):
        work(admission, clock, images=1, each_s=0.01)
        clock.now_s += 0.1
    assert admission.room == 256


def test_old_throughput_is_forgotten(clock):
    admission = Admission(256, minimum=4, deadline_s=10.0, now=clock)
    work(admission, clock, images=5, each_s=2.0)
    assert admission.room == 4
    clock.now_s += 11
    assert admission.room == 256


def test_retry_after_follows_the_throughput(clock):
    admission = Admission(10, now=clock)

    def retry_after_s(images: int) -> float:
        with pytest.raises(TooManyRequests) as refused:
            admission.refuse_if_full(images)
        return refused.value.retry_after_s

    assert retry_after_s(11) == 1
    work(admission, clock, images=20, each_s=0.5)  # two per second
    with admission.admit(10):
        assert [retry_after_s(images) for images in (1, 8, 1000)] == [1, 4, 60]


def test_a_bucket_refills_evenly(clock):
    buckets = Buckets(Rate.parse("4/second"), now=clock)
    assert [buckets.take("a", 1) for _ in range(5)] == [0, 0, 0, 0, 0.25]
    assert buckets.take("b", 4) == 0  # each client has its own
    clock.now_s = 0.25
    assert [buckets.take("a", 1), buckets.take("a", 1)] == [0, 0.25]
    clock.now_s = 100
    assert [buckets.take("a", 4), buckets.take("a", 1)] == [0, 0.25]  # never more than full


def test_a_request_above_the_capacity_leaves_a_debt(clock):
    buckets = Buckets(Rate.parse("4/second"), now=clock)
    assert buckets.take("a", 12) == 0
    assert buckets.take("a", 1) == pytest.approx(2.25)
    clock.now_s = 2.25
    assert buckets.take("a", 1) == 0


def test_the_number_of_buckets_is_bounded():
    buckets = Buckets(Rate.parse("1/hour"), max_buckets=10)
    for number in range(100):
        buckets.take(str(number), 1)
    assert len(buckets._buckets) == 10
    assert buckets.take("99", 1) > 0


@pytest.mark.parametrize("text", ["", "0/second", "5", "5/day", "-1/hour", "1.5/second", "5/second "])
def test_invalid_rates_are_refused(text):
    with pytest.raises(ValueError, match="10/second"):
        Rate.parse(text)


def test_clients_are_keys_ipv4_addresses_or_ipv6_networks():
    assert client_name("ab", "1.2.3.4") == "key ab"
    assert client_name(None, "2001:db8::1") == client_name(None, "2001:db8::ffff:1")
    assert client_name(None, "2001:db8::1") != client_name(None, "2001:db8:0:1::1")
    assert client_name(None, "::ffff:1.2.3.4") == client_name(None, "1.2.3.4")


def ask(service, image, **headers):
    return service.post("/recognize", content=image, headers={"Content-Type": "image/png", **headers})


def test_each_key_has_its_own_limit_and_operations_have_none(serve, small_bundle, giraffe):
    with serve(small_bundle, api_keys=("one", "two"), rate_limit="2/hour") as service:
        statuses = [ask(service, giraffe, **{"X-API-Key": "one"}).status_code for _ in range(2)]
        refused = ask(service, giraffe, **{"X-API-Key": "one"})
        assert [*statuses, refused.status_code] == [200, 200, 429]
        assert refused.headers["content-type"] == "application/problem+json"
        assert 1700 < int(refused.headers["retry-after"]) <= 1800
        assert 'wikiclip_images_total{outcome="rate"} 1.0' in service.get("/metrics").text
        assert ask(service, giraffe, **{"X-API-Key": "two"}).status_code == 200
        assert ask(service, giraffe).status_code == 401
        for path in ("/livez", "/readyz", "/metrics", "/info", "/", "/docs", "/openapi.json"):
            assert all(service.get(path).status_code == 200 for _ in range(4))


def test_a_batch_counts_its_images(serve, small_bundle, giraffe):
    with serve(small_bundle, rate_limit="5/hour") as service:

        def batch(images: int) -> int:
            return service.post("/recognize/batch", files=[("image", giraffe)] * images).status_code

        assert [batch(4), batch(2), batch(1), batch(1)] == [200, 429, 200, 429]


def test_processes_share_buckets_in_redis(redis_server):
    _, url = redis_server()
    rate = Rate.parse("3/hour")

    async def take_turns() -> list[bool]:
        limiters = [RateLimiter(rate, RedisLink(url, 5.0)) for _ in range(2)]
        granted = [await granted_by(limiters[turn % 2], "a") for turn in range(5)]
        granted.append(await granted_by(limiters[0], "b"))
        for limiter in limiters:
            await limiter.close()
        return granted

    assert asyncio.run(take_turns()) == [True, True, True, False, False, True]


def test_redis_and_the_process_agree_on_the_wait(redis_server):
    _, url = redis_server()
    rate = Rate.parse("60/minute")

    async def waits(limiter: RateLimiter) -> list[float]:
        await limiter.take("a", 100)
        found_s = []
        for images in (1, 60, 500):
            with pytest.raises(TooManyRequests) as refused:
                await limiter.take("a", images)
            found_s.append(refused.value.retry_after_s)
        await limiter.close()
        return found_s

    assert asyncio.run(waits(RateLimiter(rate, RedisLink(url, 5.0)))) == pytest.approx([41, 100, 100], abs=1)
    assert asyncio.run(waits(RateLimiter(rate))) == pytest.approx([41, 100, 100], abs=1)


def test_a_process_falls_back_to_its_own_buckets_without_redis(redis_server):
    process, url = redis_server()

    async def with_redis_killed() -> list[bool]:
        limiter = RateLimiter(Rate.parse("2/hour"), RedisLink(url, 5.0))
        granted = [await granted_by(limiter, "a") for _ in range(3)]
        process.kill()
        process.wait()
        started_at = time.monotonic()
        granted += [await granted_by(limiter, "a") for _ in range(3)]
        assert time.monotonic() - started_at < 5
        await limiter.close()
        return granted

    assert asyncio.run(with_redis_killed()) == [True, True, False, True, True, False]


async def granted_by(limiter: RateLimiter, client: str) -> bool:
    try:
        await limiter.take(client, 1)
    except TooManyRequests:
        return False
    return True
