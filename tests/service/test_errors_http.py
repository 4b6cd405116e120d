"""Which requests are refused, with which problem, and that the next request succeeds."""

from __future__ import annotations

import http.client
import io
import json
import socket
import struct
import zlib

import pytest
from PIL import Image


def giant_png(side: int) -> bytes:
    """A one-bit PNG of `side` x `side` pixels in a few kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (side + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((400, 400), 80).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def post(content: bytes, content_type: str | None = "image/png", **parameters):
    headers = {} if content_type is None else {"Content-Type": content_type}
    return {"url": "/recognize", "content": content, "headers": headers, "params": parameters}


JSON = "application/json"
FORM = "multipart/form-data; boundary=b"
REFUSED = {
    "an empty body": (post(b""), 400, "empty"),
    "an empty body of no type": (post(b"", None), 400, "empty"),
    "a text file": (post(b"hello, I am text"), 422, "not an image"),
    "a text file that says so": (post(b"hello", "text/plain"), 415, "text/plain"),
    "an image of no type": (post(b"\x89PNG\r\n\x1a\n", None), 415, "image/png"),
    "a drawing": (post(b"<svg/>", "image/svg+xml"), 415, "image/svg+xml"),
    "a truncated JPEG": (post(truncated_jpeg(), "image/jpeg"), 422, "truncated"),
    "a giant PNG": (post(giant_png(30_000)), 413, "30000 x 30000"),
    "no JSON": (post(b"{", JSON), 400, "JSON"),
    "JSON of another shape": (post(b'{"image": "x"}', JSON), 400, "base64"),
    "JSON that is a list": (post(b"[]", JSON), 400, "base64"),
    "malformed base64": (post(b'{"image": {"base64": "@@@"}}', JSON), 400, "base64"),
    "empty base64": (post(b'{"image": {"base64": ""}}', JSON), 400, "empty"),
    "a URL": (post(b'{"image": {"url": "http://example.com/a.png"}}', JSON), 403, "URL input is disabled"),
    "two images": ({"url": "/recognize", "files": [("image", b"1"), ("image", b"2")]}, 422, "none of the 2 images"),
    "a form without the field": ({"url": "/recognize", "files": {"picture": b"1"}}, 400, "named image"),
    "an empty field": ({"url": "/recognize", "files": {"image": b""}}, 400, "empty"),
    "a text file in a form": ({"url": "/recognize", "files": {"image": ("a.txt", b"a")}}, 415, "text/plain"),
    "a form that ends early": (
        post(b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc', FORM),
        400,
        "incomplete",
    ),
    "a malformed form": (post(b"nothing of the kind", FORM), 400, "malformed"),
    "a form without a boundary": (post(b"--b", "multipart/form-data"), 400, "boundary"),
    "top_k of 0": (post(b"x", top_k=0), 422, "top_k"),
    "top_k of 101": (post(b"x", top_k=101), 422, "top_k"),
    "top_k in words": (post(b"x", top_k="five"), 422, "top_k"),
    "min_score of nan": (post(b"x", min_score="nan"), 422, "min_score"),
    "a box of three": (post(b"x", box="0,0,1"), 422, "box"),
    "a box outside": (post(b"x", box="0.5,0,0.6,1"), 422, "box"),
    "a box of nan": (post(b"x", box="nan,0,1,1"), 422, "box"),
    "a batch that is no form": ({**post(b"x"), "url": "/recognize/batch"}, 415, "multipart"),
    "too large a batch": ({"url": "/recognize/batch", "files": [("image", b"x")] * 33}, 400, "at most 32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_and_the_next_is_served(service, giraffe, name):
    request, status, said = REFUSED[name]
    answer = service.post(**request)
    check_problem(answer, status)
    assert said in answer.json()["detail"]
    after = service.post(**post(giraffe))
    assert after.status_code == 200
    assert after.json()["predictions"][0]["entity_id"] == "Q15083"


@pytest.mark.parametrize("name", ["nothing wrong", "a text file", "a form that ends early", "top_k of 0", "a URL"])
def test_who_asks_from_a_page_is_told_what_others_are(service, giraffe, name):
    """A request with an `Origin` takes the way through the framework, others go around it."""
    request, status, _ = REFUSED.get(name, (post(giraffe), 200, ""))
    from_a_page = {**request, "headers": {**request["headers"], "Origin": "https://a.example"}}
    answers = [service.post(**each) for each in (request, from_a_page)]
    assert [answer.status_code for answer in answers] == [status] * 2
    own = {"request_id", "timings_ms", "cached"}
    assert len({json.dumps({k: v for k, v in answer.json().items() if k not in own}) for answer in answers}) == 1
    named = [set(answer.headers) for answer in answers]
    assert named[0] == named[1]
    unlike = {"date", "x-request-id", "server-timing", "content-length"}
    assert len({json.dumps({k: v for k, v in answer.headers.items() if k not in unlike}) for answer in answers}) == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/entities/Q0", 404),
        ("GET", "/entities/Q0/thumbnail", 404),
        ("GET", "/entities/Q15083/thumbnail", 404),
        ("GET", "/entities", 422),
        ("GET", "/entities?query=", 422),
        ("GET", "/entities?query=a&limit=0", 422),
        ("GET", "/nothing/here", 404),
        ("GET", "/page/nothing.js", 404),
        ("GET", "/page/../app.py", 404),
        ("GET", "/page/%2e%2e/app.py", 404),
        ("GET", "/recognize", 405),
        ("DELETE", "/info", 405),
        ("PATCH", "/entities/Q1", 405),
    ],
)
def test_other_errors_are_problems_too(service, method, path, status):
    check_problem(service.request(method, path), status)


def check_problem(answer, status: int) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert "\n" not in problem["detail"]


def test_a_body_over_the_limit_is_answered_though_it_is_still_coming(service):
    answer = service.post(**post(b"\0" * (21 * 1024**2)))
    check_problem(answer, 413)
    assert service.get("/livez").status_code == 200


def test_who_asks_before_sending_a_body_over_the_limit_is_answered_at_once(service):
    address = service.base_url.host, service.base_url.port
    head = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nExpect: 100-continue\r\n"
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % (1 << 30))
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 413 ")  # and no 100 before it
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head + b"Connection: close\r\nContent-Length: 5\r\n\r\n")
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hello")
        assert connection.recv(12) == b"HTTP/1.1 422"


def test_the_limit_holds_for_a_body_of_unknown_length(service):
    def chunks():
        for _ in range(21):
            yield b"\0" * 1024**2

    check_problem(service.post("/recognize", content=chunks(), headers={"Content-Type": "image/png"}), 413)


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(service, giraffe):
    address = service.base_url.host, service.base_url.port
    with socket.create_connection(address) as connection:
        connection.sendall(
            b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 999\r\n\r\nabc"
        )
    assert service.post(**post(giraffe)).status_code == 200


def test_an_error_quotes_a_hostile_path_safely(service):
    connection = http.client.HTTPConnection(service.base_url.host, service.base_url.port)
    connection.request("GET", "/entities/%22%3Cscript%3E%0d%0aX-Evil:%201")
    answer = connection.getresponse()
    assert answer.status == 404
    assert answer.headers["X-Evil"] is None
    assert json.loads(answer.read())["status"] == 404
    connection.close()
