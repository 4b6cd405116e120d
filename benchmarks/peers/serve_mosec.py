"""mosec: one preprocessing worker per core, then a stage that batches, as in its ResNet example."""

from __future__ import annotations

from typing import Any

from mosec import Server, Worker

from benchmarks.peers import MAX_BATCH, Recognizer, make_decoder, read_job


class Preprocess(Worker):
    def __init__(self) -> None:
        self._decode = make_decoder(read_job())

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Any:
        return self._decode(data)


class Inference(Worker):
    def __init__(self) -> None:
        self._recognizer = Recognizer(read_job())

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        return self._recognizer.recognize(data)


def main() -> None:
    """Serve. mosec reads `--port` and `--address` itself."""
    server = Server()
    server.append_worker(Preprocess, num=read_job()["cores"], timeout=60)
    server.append_worker(Inference, num=1, max_batch_size=MAX_BATCH, max_wait_time=5, timeout=60)
    server.run()


if __name__ == "__main__":
    main()
