"""Metrics for Prometheus, traces for OpenTelemetry and logs as JSON."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.types import Scope

from core.errors import needed_by
from service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)

PROBE_PATHS = frozenset(("/livez", "/readyz", "/metrics"))  # polled every few seconds
_EXPORT_TIMEOUT_S = 5.0  # also the longest that an unreachable collector delays shutdown

_JSON = json.JSONEncoder(default=str)  # ASCII only
_LOG_FIELDS = ("request_id", "method", "path", "status", "elapsed_ms", "client")


class Metrics:
    """The metrics of one recogniser and its app, in a registry of their own: one process may run several apps."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        counter, gauge = partial(Counter, registry=registry), partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.requests = counter("wikiclip_requests", "Requests answered.", ["route", "status"])
        self.request_seconds = histogram(
            "wikiclip_request_seconds", "Time to answer a request.", ["route"], buckets=_SECONDS
        )
        self.stage_seconds = histogram(
            "wikiclip_stage_seconds",
            "Time an image spent in a stage: decode, queue, encode (its whole batch), search.",
            ["stage"],
            buckets=_SECONDS,
        )
        self.images = counter(
            "wikiclip_images",
            "Images by outcome: answered, full (limit of the queue or of bodies), rate (rate limit), deadline, "
            "abandoned (client disconnected), undecodable, too_large, refused (other client errors), failed (internal "
            "errors).",
            ["outcome"],
        )
        self.batch_images = histogram("wikiclip_batch_images", "Images encoded together.", buckets=_IMAGES)
        self.cache_lookups = counter(
            "wikiclip_cache_lookups", "Lookups by result: answer, embedding or miss.", ["found"]
        )
        self.engine_deaths = counter("wikiclip_engine_deaths", "Times that the engine thread died and was replaced.")
        self.bundle_swaps = counter("wikiclip_bundle_swaps", "Bundle swaps by outcome: loaded or refused.", ["outcome"])
        self.bundle = gauge("wikiclip_bundle", "1 for the current bundle.", ["model", "bundle"])
        self.redis_errors = counter("wikiclip_redis_errors", "Failed Redis calls.")
        self.in_flight_images = gauge("wikiclip_in_flight_images", "Images accepted and not yet answered.")
        self.queue_images = gauge("wikiclip_queue_images", "Images waiting for the engine.")
        self.ready = gauge("wikiclip_ready", "1 while the service can answer requests.")

    def count_images(self, outcome: str, images: int = 1) -> None:
        self.images.labels(outcome).inc(images)

    def observe_answer(self, timings_ms: Mapping[str, float], images: int = 1) -> None:
        """Count an image, or several with one answer, as answered, and observe the time of each stage."""
        self.count_images("answered", images)
        for stage, value_ms in timings_ms.items():
            self.stage_seconds.labels(stage).observe(value_ms / 1000)

    def observe_request(self, route: str, status: int, elapsed_s: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.request_seconds.labels(route).observe(elapsed_s)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


# The OpenTelemetry tracer and context of the request that this task answers.
_current_request: ContextVar[tuple[Any, Any] | None] = ContextVar("current_request", default=None)


def record_stages(times: Mapping[str, tuple[float, float]]) -> None:
    """Add stages (name -> start and end by `time.monotonic`) to the current request's trace, if there is one."""
    current = _current_request.get()
    if current is None:
        return
    tracer, context = current
    epoch_ns = time.time_ns() - int(1e9 * time.monotonic())
    for name, at in times.items():
        started_ns, ended_ns = (epoch_ns + int(1e9 * each) for each in at)
        tracer.start_span(name, context, start_time=started_ns).end(ended_ns)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Record the block as a stage of the current request's trace, even if it raises."""
    started_at = time.monotonic()
    try:
        yield
    finally:
        record_stages({name: (started_at, time.monotonic())})


class Tracing:
    """Creates a span for each request and exports spans from a background thread. `close` sends the remaining ones.

    The OpenTelemetry SDK reads its own variables, such as OTEL_TRACES_SAMPLER and OTEL_RESOURCE_ATTRIBUTES.
    Its imports are local because the extra `otel` is optional.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        release = version("wikiclip-serve")
        name = os.environ.get("OTEL_SERVICE_NAME") or "wikiclip-serve"
        resource = Resource.create({"service.name": name, "service.version": release})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("wikiclip.service", release)

    @contextmanager
    def request(self, scope: Scope, request_id: str) -> Iterator[Callable[[str, int], None]]:
        """Open a span for the block and yield a function that takes the route and the status of the response.

        A `traceparent` header makes the span part of the caller's trace.
        """
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if scope["path"] in PROBE_PATHS:
            yield lambda route, status: None
            return
        method = scope["method"]
        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        attributes = {"http.request.method": method, "request_id": request_id}
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)

        def set_response(route: str, status: int) -> None:
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.route": route, "http.response.status_code": status})
            if status >= 500:
                span.set_status(StatusCode.ERROR)

        token = _current_request.set((self._tracer, set_span_in_context(span)))
        try:
            yield set_response
        finally:
            _current_request.reset(token)
            span.end()

    def close(self) -> None:
        self._provider.shutdown()


def open_tracing(settings: Settings) -> Tracing | None:
    """Return the tracing that `settings` ask for, None if it is off. Raises `MissingExtra`."""
    if settings.otlp_endpoint is None:
        return None
    with needed_by("otlp_endpoint"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    endpoint = settings.otlp_endpoint.rstrip("/") + "/v1/traces"
    return Tracing(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S))


class JsonFormatter(logging.Formatter):
    """Formats each record as one line of JSON in ASCII: what a request contains must not control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _LOG_FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _JSON.encode(line)


def configure_logging(level: str) -> None:
    """Log to stderr: the service's own messages from `level` up, those of libraries from warnings up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("wikiclip").setLevel(level.upper())
