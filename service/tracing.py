"""Traces for OpenTelemetry, by the extra `otel`: a span for each request, and within it one for each stage.

Off by default, and then all that is left is a look at a context variable for each stage. What computes says when a
stage began and ended and knows of no trace; the SDK is imported only where one is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from core.errors import UserError
from service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_UNTRACED = frozenset(("/livez", "/readyz", "/metrics"))  # asked every few seconds, by machines
_EXPORT_TIMEOUT_S = 5.0  # a collector that is gone delays the end of the service by no more


class RequestTrace:
    """The span of one request, and those of its stages."""

    def __init__(self, tracer: Any, span: Any, method: str) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer, self._span, self._method = tracer, span, method
        self._context = set_span_in_context(span)
        self._epoch_ns = time.time_ns() - int(1e9 * time.monotonic())

    def stage(self, name: str, started_at: float, ended_at: float) -> None:
        started_ns, ended_ns = (self._epoch_ns + int(1e9 * at) for at in (started_at, ended_at))
        self._tracer.start_span(name, self._context, start_time=started_ns).end(ended_ns)

    def answered(self, route: str, status: int) -> None:
        """What the request was, which is known when it is answered."""
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)


_current: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)


def stages(began_and_ended_at: Mapping[str, tuple[float, float]]) -> None:
    """Stages of the request that is being answered, by `time.monotonic`; nothing where no traces are kept."""
    trace = _current.get()
    if trace is not None:
        for name, (started_at, ended_at) in began_and_ended_at.items():
            trace.stage(name, started_at, ended_at)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """The block as a stage of the request that is being answered, however it ends."""
    started_at = time.monotonic()
    try:
        yield
    finally:
        stages({name: (started_at, time.monotonic())})


class Tracing:
    """Makes spans and hands them to an exporter from a thread of its own. Close it to send what is left.

    The SDK itself heeds OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES and the like.
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
    def request(self, scope: Scope, request_id: str) -> Iterator[RequestTrace | None]:
        """A span while the block runs, in the trace of the caller where its headers name one (`traceparent`)."""
        if scope["path"] in _UNTRACED:
            yield None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        caller = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        attributes = {"http.request.method": scope["method"], "request_id": request_id}
        span = self._tracer.start_span(scope["method"], caller, SpanKind.SERVER, attributes)
        trace = RequestTrace(self._tracer, span, scope["method"])
        token = _current.set(trace)
        try:
            yield trace
        finally:
            _current.reset(token)
            span.end()

    def close(self) -> None:
        self._provider.shutdown()


def open_tracing(settings: Settings) -> Tracing | None:
    """What `settings` want kept of requests, None for nothing. Raises `UserError` where the extra is missing."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UserError("otlp_endpoint needs the extra otel; pip install 'wikiclip-serve[otel]'") from error
    endpoint = settings.otlp_endpoint.rstrip("/") + "/v1/traces"
    return Tracing(OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_TIMEOUT_S))
