"""mosec: a stage of preprocessing workers, one a core, before a stage that batches, as its ResNet example has it."""

from __future__ import annotations

from typing import Any

from mosec import Server, Worker

from benchmarks.peers.workload import MAX_BATCH, Recogniser, decoder, job


class Preprocess(Worker):
    def __init__(self) -> None:
        self._decode = decoder(job())

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> Any:
        return self._decode(data)


class Inference(Worker):
    def __init__(self) -> None:
        self._recogniser = Recogniser(job())

    def forward(self, data: list[Any]) -> list[dict[str, Any]]:
        return self._recogniser.recognise(data)


def main() -> None:
    """The port is given as `--port`, which mosec reads itself."""
    server = Server()
    server.append_worker(Preprocess, num=job()["cores"], timeout=60)
    server.append_worker(Inference, num=1, max_batch_size=MAX_BATCH, max_wait_time=5, timeout=60)
    server.run()


if __name__ == "__main__":
    main()
