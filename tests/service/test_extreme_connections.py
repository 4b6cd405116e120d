"""Extreme connections of `benchmarks.extreme`: each gets a 4xx with a reason or is closed, and other
clients are answered meanwhile.
"""

from __future__ import annotations

import gc
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from benchmarks import extreme

RECEIVE_MS = 500
LONGEST_SILENCE_S = 1.0  # of /livez, on an idle machine some milliseconds


@pytest.fixture(scope="module")
def service(serve, small_bundle):
    with serve(small_bundle, receive_timeout_ms=RECEIVE_MS) as client:
        yield client


@pytest.fixture
def livez_silence(service):
    """Ask /livez on other connections all the time. Yields the longest wait, which grows."""
    longest_s = [0.0]
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            started_at = time.monotonic()
            httpx.get(f"{service.base_url}/livez", timeout=30).raise_for_status()
            longest_s[0] = max(longest_s[0], time.monotonic() - started_at)
            stop.wait(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    yield longest_s
    stop.set()
    asking.join()


@pytest.mark.parametrize(
    ("name", "expected", "reason"),
    [
        ("pipelined", [200] * 1000, b""),
        ("large_second_head", [200, 431], b"the request head is over 65536 bytes; send less"),
        ("many_headers", [431], b"the request has over 128 headers; send fewer"),
        ("slow_chunks", [408], b"the body did not arrive within 0.5 s; send a smaller image"),
        ("endless_chunk_extension", [431], b"the framing of the request body is over 65536 bytes; send less"),
        ("endless_trailer", [431], b"the framing of the request body is over 65536 bytes; send less"),
        ("upgrade_with_body", [422, 200], b""),
        ("multipart_parts", [413], b"the form has over 24 parts; send fewer"),
        ("wide_json", [400], b"the JSON has over 100000 values; send {"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_extreme_connections_are_refused_and_others_served(service, livez_silence, name, expected, reason):
    received = extreme.connect(name, service.base_url.host, service.base_url.port)
    assert extreme.statuses(received) == expected
    assert reason in received.replace(b"\\", b"")
    assert service.get("/readyz").status_code == 200
    assert livez_silence[0] < LONGEST_SILENCE_S


def test_a_client_that_reads_no_response_is_disconnected(service, livez_silence):
    answered = extreme.statuses(extreme.connect("unread", service.base_url.host, service.base_url.port))
    assert set(answered) == {200}
    assert len(answered) < 100_000  # of 3,200,000: those whose responses the kernel's buffers hold
    assert livez_silence[0] < LONGEST_SILENCE_S


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"image":' * 100_000, 400, b"the body is not JSON (depth limit exceeded"),
        (b'{"image":{"base64":"' + b"QUJD\\n" * 3_400_000 + b'"}}', 422, b"the bytes are not an image"),
        (b'{"image":{"base64":"' + b"\\u0041" * 3_400_000 + b'"}}', 422, b"the bytes are not an image"),
    ],
    ids=["deep", "base64 in lines", "escaped"],
)
def test_large_json_does_not_stop_others(service, livez_silence, body, status, reason):
    received = extreme.send(service.base_url.host, service.base_url.port, extreme.posted(b"application/json", body))
    assert extreme.statuses(received) == [status]
    assert reason in received
    assert livez_silence[0] < LONGEST_SILENCE_S


def test_pipelined_requests_wait_unparsed(serve, small_bundle, giraffe, gated_encoder):
    head = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(
        giraffe
    )
    with (
        serve(small_bundle, encoder=gated_encoder) as service,
        socket.create_connection((service.base_url.host, service.base_url.port), 120) as connection,
    ):
        connection.sendall(head + giraffe + extreme.GET * 2000)
        assert gated_encoder.entered.acquire(timeout=120)
        assert service.get("/livez").status_code == 200
        waiting = [each for each in gc.get_objects() if type(each) is RequestResponseCycle]
        assert len(waiting) < 100
        gated_encoder.gate.set()
        connection.sendall(extreme.LAST_GET)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    assert extreme.statuses(received) == [200] * 2002


def test_no_more_is_read_than_is_answered(service):
    request = extreme.POST % b"image/png" + b"Content-Length: 1\r\n\r\nx"
    sent_bytes = 0

    def requests() -> Iterator[bytes]:
        nonlocal sent_bytes
        for _ in range(80):
            yield request * 6000
            sent_bytes += 6000 * len(request)

    answered = extreme.statuses(extreme.send(service.base_url.host, service.base_url.port, requests()))
    # The rest is in the kernel's buffers, on both sides, and one packet in the service.
    assert sent_bytes < len(answered) * len(request) + 20_000_000


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("chunked", [False, True])
def test_curl_asking_for_http2_sends_an_image(service, giraffe, tmp_path, chunked):
    (tmp_path / "giraffe.png").write_bytes(giraffe)
    image = [*(["-H", "Transfer-Encoding: chunked"] if chunked else []), "--data-binary", "@giraffe.png"]
    url = f"{service.base_url}/recognize"
    command = ["curl", "-s", "--http2", "-w", "%{http_code}", "-H", "Content-Type: image/png", *image, url]
    # The second request uses the same connection.
    done = subprocess.run([*command, "--next", *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.count('"Q15083"') == 2
    assert done.stdout.count("}200") == 2


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /livez HTTP/1.0\r\n\r\n", 200),
        (b"GET http://a/livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", 200),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (extreme.CHUNKED + b"x\r\n", 400),
        (extreme.CHUNKED[:-2] + b"Content-Length: 1\r\n\r\n0\r\n\r\n", 400),
        (extreme.CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n", 100),
    ],
)
def test_other_forms_of_requests(service, request_bytes, status):
    received = extreme.send(service.base_url.host, service.base_url.port, [request_bytes])
    assert extreme.statuses(received)[0] == status


def test_trailers_are_not_headers(service, giraffe):
    body = b"%x\r\n%b\r\n0\r\nContent-Type: image/png\r\n\r\n" % (len(giraffe), giraffe)
    head = b"POST /recognize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    received = extreme.send(service.base_url.host, service.base_url.port, [head + body])
    assert extreme.statuses(received) == [415]


def test_a_slow_reader_gets_all_of_a_response(serve, small_bundle):
    """It receives little at a time, but never nothing for the time limit."""
    requests = 400
    get = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n"
    received = 0
    with (
        serve(small_bundle, receive_timeout_ms=1000) as service,
        socket.create_connection((service.base_url.host, service.base_url.port), 120) as connection,
    ):
        size_bytes = len(service.get("/openapi.json").content)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
        connection.sendall((get + b"\r\n") * (requests - 1) + get + b"Connection: close\r\n\r\n")
        began_at = time.monotonic()
        while chunk := connection.recv(16384):
            received += len(chunk)
            if time.monotonic() < began_at + 2.5:
                time.sleep(0.02)  # the slow reading is what is tested
    assert received > requests * size_bytes


def test_requests_may_be_cut_into_packets_anywhere(service, giraffe):
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    chunks = b"%x;ext\r\n%b\r\n1\r\n%b\r\n0\r\nX: trailer\r\n\r\n" % (len(giraffe) - 1, giraffe[:-1], giraffe[-1:])
    length = b"Content-Length: %d\r\n\r\n" % len(giraffe)
    image = extreme.POST % b"image/png"
    requests = [
        (extreme.GET, 200),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200),
        (image + length + giraffe, 200),
        (image + upgrade + length + giraffe, 200),
        (extreme.CHUNKED + chunks, 200),
        (extreme.CHUNKED[:-2] + upgrade + b"\r\n" + chunks, 200),
        (b"POST /nowhere HTTP/1.1\r\nHost: a\r\n" + length + giraffe, 404),  # answered before its body is there
        (b"POST /nowhere HTTP/1.1\r\nHost: a\r\n" + upgrade + b"Transfer-Encoding: chunked\r\n\r\n" + chunks, 404),
    ]
    random = Random(7)
    for _ in range(40):
        chosen = random.choices(requests, k=8)
        sent = b"".join(request for request, _ in chosen) + extreme.LAST_GET
        cuts = [0, *sorted(random.choices(range(len(sent)), k=random.choice([0, 3, 40]))), len(sent)]
        pieces = [sent[start:end] for start, end in pairwise(cuts)]
        received = extreme.send(service.base_url.host, service.base_url.port, paced(pieces, random))
        assert extreme.statuses(received) == [*(status for _, status in chosen), 200]


def paced(pieces: list[bytes], random: Random) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        time.sleep(random.choice([0, 0, 0.002]))  # otherwise the kernel joins the pieces
