"""A request leaves no reference cycles. Under overload, they would keep request bodies in memory until a collection."""

from __future__ import annotations

import gc
import http.client
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from core.errors import UndecodableImage
from service.recognizer import Recognizer
from service.settings import Settings

REQUESTS = 20
OURS = ("core", "service", "uvicorn")


@contextmanager
def collected() -> Iterator[Counter[str]]:
    """Count the objects of the service that only the garbage collector can free after the block, by type."""
    found: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = (type(each) for each in gc.garbage)
        found.update(kind.__qualname__ for kind in kinds if kind.__module__.split(".")[0] in OURS)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


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
    form = service.build_request("POST", target, files=[("image", image) for image in (giraffe, giraffe[:100])])
    bodies = {"whole": giraffe, "cut": giraffe[:100], "both": form.read()}
    content_type = form.headers["content-type"] if name == "both" else "image/png"
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


def test_nor_is_anything_of_images_without_http(small_bundle, giraffe):
    with Recognizer.open(small_bundle, Settings(threads=1)) as recognizer:
        recognizer.recognize_many([giraffe])
        with collected() as found:
            answers = recognizer.recognize_many([giraffe, giraffe[:100]] * REQUESTS)
            assert sum(isinstance(answer, UndecodableImage) for answer in answers) == REQUESTS
            del answers
    assert found == {}
