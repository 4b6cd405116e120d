"""The cache, by itself, in the service, and with a real Redis that dies."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time

import numpy as np
import redis

from service.cache import Cache, Lru, SingleFlight, cache_key


def test_the_least_recently_used_goes_first():
    lru = Lru(max_bytes=3 * (1 + 100 + 200))  # key, value and what an entry itself takes
    for key in "abc":
        lru.put(key, bytes(100))
    assert lru.get("a") is not None
    lru.put("d", bytes(100))
    assert [lru.get(key) is not None for key in "abcd"] == [True, False, True, True]


def test_the_size_stays_bounded():
    lru = Lru(max_bytes=10_000)
    for number in range(1000):
        lru.put(str(number % 70), bytes(number % 150))
        assert lru.size_bytes <= 10_000
    lru.put("too large by itself", bytes(20_000))
    assert lru.size_bytes <= 10_000
    assert lru.get("too large by itself") is None


def test_a_key_changes_with_each_thing_it_depends_on():
    keys = {
        cache_key("answer", "hash", "bundle", "options"),
        cache_key("embedding", "hash", "bundle", "options"),
        cache_key("answer", "other", "bundle", "options"),
        cache_key("answer", "hash", "other", "options"),
        cache_key("answer", "hash", "bundle", "other"),
        cache_key("answer", "hash", "bundleo", "ptions"),
    }
    assert len(keys) == 6


def test_equal_work_is_done_once_and_other_work_beside_it():
    async def run() -> tuple[list[str], list[str]]:
        done: list[str] = []
        flights: SingleFlight[str] = SingleFlight()

        async def work(name: str) -> str:
            await asyncio.sleep(0)
            done.append(name)
            return name

        names = ["a", "a", "b", "a"]
        return await asyncio.gather(*(flights.run(name, lambda name=name: work(name)) for name in names)), done

    answers, done = asyncio.run(run())
    assert answers == ["a", "a", "b", "a"]
    assert sorted(done) == ["a", "b"]


def test_one_who_leaves_does_not_stop_the_others_but_the_last_one_does():
    async def run() -> None:
        flights: SingleFlight[str] = SingleFlight()
        gate = asyncio.Event()
        ended: list[str] = []

        async def work() -> str:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise
            return "done"

        leader, follower = (asyncio.create_task(flights.run("key", work)) for _ in range(2))
        await asyncio.sleep(0.01)
        leader.cancel()
        await asyncio.wait([leader])
        gate.set()
        assert await follower == "done"

        gate.clear()
        alone = asyncio.create_task(flights.run("key", work))
        await asyncio.sleep(0.01)
        alone.cancel()
        await asyncio.wait([alone])
        await asyncio.sleep(0.01)
        assert ended == ["cancelled"]

    asyncio.run(run())


def test_an_error_reaches_all_who_wait_and_is_not_kept():
    async def run() -> list[object]:
        flights: SingleFlight[str] = SingleFlight()

        async def fail() -> str:
            await asyncio.sleep(0)
            raise ValueError("no")

        async def succeed() -> str:
            return "yes"

        both = await asyncio.gather(*(flights.run("key", fail) for _ in range(2)), return_exceptions=True)
        return [*both, await flights.run("key", succeed)]

    first, second, third = asyncio.run(run())
    assert isinstance(first, ValueError)
    assert isinstance(second, ValueError)
    assert third == "yes"


def ask(service, image: bytes, **parameters):
    return service.post("/recognize", params=parameters, content=image, headers={"Content-Type": "image/png"})


def test_processes_share_a_redis(serve, small_bundle, small_images, redis_server):
    _, url = redis_server()
    with (
        serve(small_bundle, redis_url=url, redis_timeout_ms=5000) as one,
        serve(small_bundle, redis_url=url, redis_timeout_ms=5000) as other,
    ):
        first = ask(one, small_images["Q140"]).json()
        second = ask(other, small_images["Q140"]).json()
        third = ask(other, small_images["Q140"], top_k=1).json()
    assert [answer["cached"] for answer in (first, second, third)] == [False, True, True]
    assert second["predictions"] == first["predictions"]
    assert third["predictions"] == first["predictions"][:1]


def test_redis_killed_and_restarted_fails_no_request(serve, small_bundle, small_images, redis_server):
    process, url = redis_server()
    images = list(small_images.items())
    with serve(small_bundle, redis_url=url, redis_timeout_ms=5000) as service:

        def check(top_k: int) -> float:
            started_at = time.monotonic()
            for entity_id, image in images:
                answer = ask(service, image, top_k=top_k)
                assert answer.status_code == 200
                assert answer.json()["predictions"][0]["entity_id"] == entity_id
            return time.monotonic() - started_at

        check(top_k=2)
        process.kill()
        process.wait()
        check(top_k=3)
        errors = [
            line for line in service.get("/metrics").text.splitlines() if line.startswith("wikiclip_redis_errors_t")
        ]
        assert float(errors[0].split()[1]) >= 1
        redis_server()
        check(top_k=4)


def test_what_redis_holds_is_hashes_embeddings_and_answers_and_damage_is_ignored(
    serve, small_bundle, small_images, redis_server
):
    _, url = redis_server()
    image = small_images["Q140"]
    with serve(small_bundle, redis_url=url, redis_timeout_ms=5000) as service, redis.Redis.from_url(url) as client:
        expected = ask(service, image).json()["predictions"]
        held = {key: client.get(key) for key in client.scan_iter()}
        assert sorted(key.split(b":")[2] for key in held) == [b"answer", b"embedding"]
        assert all(client.ttl(key) > 0 for key in held)
        assert not any(image in value or b"IHDR" in value for value in held.values())
        for key in held:
            client.set(key, b"garbage")
        with serve(small_bundle, redis_url=url, redis_timeout_ms=5000) as other:
            answer = ask(other, image).json()
    assert answer["predictions"] == expected
    assert answer["cached"] is False


def test_entries_of_an_unexpected_shape_are_computed_again_and_replaced(
    serve, small_bundle, small_images, redis_server
):
    _, url = redis_server()
    image = small_images["Q140"]
    settings = {"redis_url": url, "redis_timeout_ms": 5000, "cache_max_bytes": 1}  # nothing is cached in the process
    with serve(small_bundle, **settings) as service, redis.Redis.from_url(url) as client:
        expected = ask(service, image).json()["predictions"]
        held = {key.split(b":")[2]: (key, client.get(key)) for key in client.scan_iter()}
        (answer_key, answer), (embedding_key, embedding) = held[b"answer"], held[b"embedding"]
        content = json.loads(answer)
        strange = [
            (answer_key, json.dumps({**content, **changed}).encode())
            for changed in (
                {"timings_ms": {"\u2603\n": 1.0}},
                {"bundle": "another@0"},
                {"known": math.nan},
                {"predictions": [{**content["predictions"][0], "score": math.inf}]},
            )
        ]
        strange += [(answer_key, value) for value in (b"[" * 100_000, answer[:-9], b"null", None)]
        strange += [(embedding_key, np.full(16, number, "<f4").tobytes()) for number in (0, 1e30, math.nan)]
        strange += [(embedding_key, value) for value in (embedding[:-4], None)]
        for key, value in strange:
            client.delete(answer_key)
            client.delete(key)
            if value is None:
                client.rpush(key, "of another program")
            else:
                client.set(key, value)
            recognized = ask(service, image)
            assert recognized.status_code == 200, value
            assert recognized.json()["predictions"] == expected, value
            assert client.get(answer_key) == answer, value
            assert client.get(embedding_key) == embedding, value


def test_a_bucket_of_an_unexpected_shape_stops_no_limit(serve, small_bundle, small_images, redis_server):
    def ask_as(key):
        headers = {"Content-Type": "image/png", "X-API-Key": key}
        return service.post("/recognize", content=small_images["Q140"], headers=headers).status_code

    _, url = redis_server()
    settings = {"redis_url": url, "redis_timeout_ms": 5000, "rate_limit": "2/hour", "api_keys": ("one", "other")}
    with serve(small_bundle, **settings) as service, redis.Redis.from_url(url) as client:
        assert ask_as("one") == 200
        (bucket,) = client.scan_iter("*:rate:*")
        client.set(bucket, "of another program")
        assert [ask_as("one") for _ in range(3)] == [200, 200, 429]  # counted in the process
        assert ask_as("other") == 200
        assert len(list(client.scan_iter("*:rate:*"))) == 2  # the other client is counted in Redis


def test_a_redis_that_never_answers_costs_its_timeout_and_then_nothing():
    """A listener that takes connections and says nothing."""

    async def run(port: int) -> list[float]:
        cache = Cache(10_000, f"redis://127.0.0.1:{port}/0", redis_timeout_s=0.5)
        times: list[float] = []
        for number in range(3):
            started_at = time.monotonic()
            assert await cache.get(str(number)) is None
            times.append(time.monotonic() - started_at)
        await cache.put("kept in the process", b"value")
        assert await cache.get("kept in the process") == b"value"
        await cache.close()
        return times

    with socket.create_server(("127.0.0.1", 0)) as silent:
        times = asyncio.run(run(silent.getsockname()[1]))
    assert 0.4 < times[0] < 5
    assert min(times[1:]) < 0.4  # it is left alone for a while


def test_cache_off_computes_each_time(serve, small_bundle, small_images):
    with serve(small_bundle, cache="off") as service:
        answers = [ask(service, small_images["Q140"]).json() for _ in range(2)]
    assert [answer["cached"] for answer in answers] == [False, False]
    assert answers[0]["predictions"] == answers[1]["predictions"]
