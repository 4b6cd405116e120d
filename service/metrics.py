"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one recogniser and the app above it, in a registry of their own: a process may hold several."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("wikiclip_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.request_seconds = Histogram(
            "wikiclip_request_seconds", "Time to answer a request.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.stage_seconds = Histogram(
            "wikiclip_stage_seconds",
            "Time an image spent in a stage: decode, queue, encode (its whole batch's), search.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.images = Counter(
            "wikiclip_images",
            "Images by outcome: answered, full (no room), rate (past the rate), deadline, abandoned (the client left), "
            "undecodable, too_large, refused (for another reason), failed (a fault of the service).",
            ["outcome"],
            registry=self.registry,
        )
        self.batch_images = Histogram(
            "wikiclip_batch_images", "Images encoded at once.", buckets=_IMAGES, registry=self.registry
        )
        self.cache_lookups = Counter(
            "wikiclip_cache_lookups",
            "Lookups by what was found: answer, embedding, or neither (miss).",
            ["found"],
            registry=self.registry,
        )
        self.engine_deaths = Counter(
            "wikiclip_engine_deaths", "Times that the engine thread died and was replaced.", registry=self.registry
        )
        self.bundle_swaps = Counter(
            "wikiclip_bundle_swaps", "Bundles swapped to, or refused.", ["outcome"], registry=self.registry
        )
        self.bundle = Gauge(
            "wikiclip_bundle", "1 for the bundle that answers now.", ["model", "bundle"], registry=self.registry
        )
        self.redis_errors = Counter("wikiclip_redis_errors", "Times that Redis failed.", registry=self.registry)
        self.in_flight_images = Gauge(
            "wikiclip_in_flight_images", "Images accepted and not yet answered.", registry=self.registry
        )
        self.queue_images = Gauge("wikiclip_queue_images", "Images waiting for the engine.", registry=self.registry)
        self.ready = Gauge("wikiclip_ready", "1 while requests can be answered.", registry=self.registry)

        # Finding the child of some labels takes longer than counting with it. All of them come from small sets.
        self._stage = cache(self.stage_seconds.labels)
        self._outcome = cache(self.images.labels)
        self._requests_of = cache(self.requests.labels)
        self._seconds_of = cache(self.request_seconds.labels)

    def count_images(self, outcome: str, images: int = 1) -> None:
        self._outcome(outcome).inc(images)

    def note_image(self, outcome: str, timings_ms: Mapping[str, float]) -> None:
        """What became of an image, and how long its stages took (`total` is none)."""
        self.count_images(outcome)
        for stage, value_ms in timings_ms.items():
            if stage != "total":
                self._stage(stage).observe(value_ms / 1000)

    def observe_request(self, route: str, status: int, elapsed_s: float) -> None:
        self._requests_of(route, str(status)).inc()
        self._seconds_of(route).observe(elapsed_s)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
