"""Rate limits: token buckets on a fake clock, and over HTTP with and without Redis."""

from __future__ import annotations

import asyncio
import time

import pytest

from core.errors import TooManyRequests
from service.limits import Buckets, Rate, RateLimiter, client_name
from service.redis_link import RedisLink


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_bucket_refills_evenly():
    clock = Clock()
    buckets = Buckets(Rate.parse("4/second"), now=clock)
    assert [buckets.take("a", 1) for _ in range(5)] == [0, 0, 0, 0, 0.25]
    assert buckets.take("b", 4) == 0  # each client has its own
    clock.now_s = 0.25
    assert [buckets.take("a", 1), buckets.take("a", 1)] == [0, 0.25]
    clock.now_s = 100
    assert [buckets.take("a", 4), buckets.take("a", 1)] == [0, 0.25]  # never more than full


def test_a_request_above_the_capacity_leaves_a_debt():
    clock = Clock()
    buckets = Buckets(Rate.parse("4/second"), now=clock)
    assert buckets.take("a", 12) == 0
    assert buckets.take("a", 1) == pytest.approx(2.25)
    clock.now_s = 2.25
    assert buckets.take("a", 1) == 0


def test_the_number_of_buckets_is_bounded():
    buckets = Buckets(Rate.parse("1/hour"), max_buckets=10)
    for number in range(100):
        buckets.take(str(number), 1)
    assert len(buckets) == 10
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
