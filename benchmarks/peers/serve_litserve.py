"""LitServe: a LitAPI with dynamic batching; requests are decoded in the worker, as its batched example has it."""

import sys
from typing import Any

import litserve
from fastapi import Request

from benchmarks.peers.workload import MAX_BATCH, Recogniser, decoder, job


class Recognise(litserve.LitAPI):
    def setup(self, device: str) -> None:
        wanted = job()
        self._decode = decoder(wanted)
        self._recogniser = Recogniser(wanted)

    # LitServe reads the kinds of request and response off these annotations, so they are no strings here.
    def decode_request(self, request: Request) -> Any:
        form: Any = request  # by now
        return self._decode(form["image"].file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        return list(inputs)

    def predict(self, pixels: list[Any]) -> list[dict[str, Any]]:
        return self._recogniser.recognise(pixels)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> Any:
        return output


def main() -> None:
    api = Recognise(max_batch_size=MAX_BATCH, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
