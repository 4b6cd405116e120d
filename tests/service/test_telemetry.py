"""Traces: a span for each request and stage, in the caller's trace, and none without an endpoint."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from core.errors import UserError
from service.settings import Settings, load_settings
from service.telemetry import JsonFormatter, Tracing, open_tracing

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ask(service, image: bytes, **headers: str):
    return service.post("/recognize", content=image, headers={"Content-Type": "image/png", **headers})


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


def traced(exporter):
    """Return the exported request spans by `request_id`, and for each its stage spans by name."""
    spans = exporter.get_finished_spans()
    requests = {span.attributes["request_id"]: span for span in spans if span.kind is SpanKind.SERVER}
    stages = {
        request_id: {
            span.name: span for span in spans if span.parent and span.parent.span_id == request.context.span_id
        }
        for request_id, request in requests.items()
    }
    return requests, stages


def test_each_request_is_a_span_with_its_stages(serve, small_bundle, giraffe, exporter):
    with serve(small_bundle, tracing=Tracing(exporter)) as service:
        assert ask(service, giraffe, **{"X-Request-ID": "first"}).status_code == 200
        assert ask(service, giraffe, **{"X-Request-ID": "again"}).json()["cached"] is True
        assert ask(service, b"no image", **{"X-Request-ID": "refused"}).status_code == 422
        assert service.get("/entities/Q15083", headers={"X-Request-ID": "entity"}).status_code == 200
    requests, stages = traced(exporter)
    assert set(requests) == {"first", "again", "refused", "entity"}  # probes are not traced
    assert requests["first"].name == "POST /recognize"
    assert requests["first"].attributes["http.response.status_code"] == 200
    assert requests["first"].resource.attributes["service.name"] == "wikiclip-serve"
    assert requests["refused"].attributes["http.response.status_code"] == 422
    assert requests["entity"].name == "GET /entities/{entity_id:path}"
    assert list(stages["first"]) == ["body", "decode", "queue", "encode", "search", "join"]
    assert set(stages["again"]) == {"body"}
    assert set(stages["refused"]) == {"body"}
    begun = requests["first"].start_time
    for span in stages["first"].values():
        # Stages follow each other within the request. Times are rounded to nanoseconds.
        assert begun - 1000 <= span.start_time <= span.end_time <= requests["first"].end_time + 1000
        begun = span.end_time


def test_a_request_joins_the_trace_of_its_caller(serve, small_bundle, giraffe, exporter):
    with serve(small_bundle, tracing=Tracing(exporter)) as service:
        ask(service, giraffe, traceparent=CALLER)
        ask(service, giraffe, traceparent="nonsense")
    ours, other = (span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER)
    assert f"00-{ours.context.trace_id:032x}-{ours.parent.span_id:016x}-01" == CALLER
    assert other.parent is None


def test_unsampled_requests_are_answered(serve, small_bundle, giraffe, exporter, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with serve(small_bundle, tracing=Tracing(exporter)) as service:
        assert ask(service, giraffe).status_code == 200
    assert exporter.get_finished_spans() == ()


def test_internal_errors_are_marked(serve, small_bundle, giraffe, exporter):
    class FaultyEncoder:
        device = "cpu"

        def encode(self, pixels_BHW3):
            raise RuntimeError("secret of the house")

    with serve(small_bundle, encoder=FaultyEncoder(), tracing=Tracing(exporter)) as service:
        assert ask(service, giraffe).status_code == 500
    (span,) = (span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER)
    assert span.status.status_code is StatusCode.ERROR
    assert not span.events  # no stack trace leaves the process


def test_requests_are_answered_without_a_collector(serve, small_bundle, giraffe):
    tracing = open_tracing(Settings(otlp_endpoint="http://127.0.0.1:9"))
    assert tracing is not None
    with serve(small_bundle, tracing=tracing) as service:
        assert [ask(service, giraffe).status_code for _ in range(3)] == [200] * 3


def test_tracing_is_off_and_not_imported_by_default():
    assert open_tracing(Settings()) is None
    # Other packages may import the SDK itself.
    probe = "import sys, service.app, service.telemetry; print(any('otlp' in name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_invalid_endpoint_is_refused():
    with pytest.raises(UserError, match="otlp_endpoint"):
        load_settings(otlp_endpoint="collector:4318")


@pytest.fixture
def log_stream():
    """Everything that is logged, formatted as the service does."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root, own = logging.getLogger(), logging.getLogger("wikiclip")
    level = own.level
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    yield stream
    root.removeHandler(handler)
    own.setLevel(level)


UNPRINTABLE = "a\nb\r\x1b[2J\x7f\x85\x9b2J\u2028\u202eb\udc80"  # ends in half of a surrogate pair, as in a file's name


def check_lines(written: str) -> list[dict[str, object]]:
    lines = written.split("\n")[:-1]
    assert lines
    assert all(line.isascii() and line.isprintable() for line in lines)
    return [json.loads(line) for line in lines]


def test_log_lines_of_requests_have_no_control_characters(serve, small_bundle, log_stream):
    with serve(small_bundle) as service:
        path = "/%0aforged%1b%5b2J%7f%c2%9b%e2%80%a8%e2%80%ae"
        assert service.get(path, headers={b"X-Request-ID": b"\xc2\x9b2J"}).status_code == 404
        assert service.post("/recognize?top_k=%0a%1b", content=b"x").status_code == 422
        assert service.post("/recognize", content=b"x", headers={b"Content-Type": b"a\xc2\x9b"}).status_code == 415
    lines = check_lines(log_stream.getvalue())
    assert "/\nforged\x1b[2J\x7f\x9b\u2028\u202e" in [line.get("path") for line in lines]


def test_log_lines_of_errors_have_no_control_characters():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    # A logger of its own: pytest-xdist cannot send half of a surrogate pair, which pytest would capture.
    log = logging.Logger("wikiclip.service")
    log.addHandler(handler)
    log.error("the bundle %s is missing", UNPRINTABLE, extra={"client": UNPRINTABLE})
    try:
        raise ValueError(UNPRINTABLE)
    except ValueError:
        log.exception("unexpected error")
    message, unexpected = check_lines(stream.getvalue())
    assert message["message"] == f"the bundle {UNPRINTABLE} is missing"
    assert UNPRINTABLE in str(unexpected["exception"])
