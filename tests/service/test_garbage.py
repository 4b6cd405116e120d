"""What a request leaves behind: nothing that only Python's collector could free. In a flood that would be most of the
memory, bodies and all, and the collector's own time besides."""

from __future__ import annotations

import gc
import http.client
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

REQUESTS = 20


@contextmanager
def collected() -> Iterator[Counter[str]]:
    """Count, when the block has ended, what of the service the collector finds there, by type."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = (type(each) for each in gc.garbage)
        found.update(kind.__qualname__ for kind in kinds if kind.__module__.split(".")[0] in ("service", "uvicorn"))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def form(*images: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="i"\r\nContent-Type: image/png\r\n\r\n'
    return b"".join(head + image + b"\r\n" for image in images) + b"--b--\r\n"


@pytest.mark.parametrize(
    ("target", "name", "status"),
    [
        ("/recognize?top_k=3", "whole", 200),
        ("/recognize?explain=true", "whole", 200),
        ("/recognize?top_k=3", "cut", 422),
        ("/recognize?explain=true", "cut", 422),
        ("/recognize?top_k=0", "whole", 422),
        ("/recognize/batch", "both", 200),
        ("/recognize/batch", "whole", 415),
        ("/nowhere", "whole", 404),
    ],
)
def test_nothing_is_left_to_the_collector(service, giraffe, target, name, status):
    bodies = {"whole": giraffe, "cut": giraffe[:100], "both": form(giraffe, giraffe[:100])}
    content_type = "multipart/form-data; boundary=b" if name == "both" else "image/png"
    connection = http.client.HTTPConnection(service.base_url.host, service.base_url.port, timeout=120)

    def ask() -> None:
        connection.request("POST", target, bodies[name], {"Content-Type": content_type})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == status

    ask()  # what is made once is made now
    with collected() as found:
        for _ in range(REQUESTS):
            ask()
    connection.close()
    # The last request may not have ended entirely.
    assert {kind: count for kind, count in found.items() if count >= REQUESTS // 2} == {}
