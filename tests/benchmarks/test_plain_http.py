from __future__ import annotations

import socket
import threading

import pytest

from benchmarks.plain_http import Connection, request_bytes

REQUEST = request_bytes("/recognize", "image/jpeg", b"image")


@pytest.mark.parametrize("polls", [False, True])
def test_an_answer_in_pieces_is_waited_for(polls: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection("127.0.0.1", server.getsockname()[1], 10.0, polls=polls)

        def answer() -> None:
            accepted, _ = server.accept()
            with accepted:
                received = b""
                while len(received) < len(REQUEST):
                    received += accepted.recv(65536)
                for piece in (b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r\nbo", b"dy"):
                    accepted.sendall(piece)

        answering = threading.Thread(target=answer)
        answering.start()
        assert connection.ask(REQUEST) == 200
        answering.join()
        connection.close()


@pytest.mark.parametrize("polls", [False, True])
def test_who_is_not_answered_gives_up(polls: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection("127.0.0.1", server.getsockname()[1], 0.1, polls=polls)
        with pytest.raises(TimeoutError):
            connection.ask(REQUEST)
