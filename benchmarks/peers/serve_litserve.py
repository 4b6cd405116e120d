"""LitServe: a LitAPI with dynamic batching that decodes in the worker, as in its batching example."""

import sys
from typing import Any

import litserve
from fastapi import Request

from benchmarks.peers import MAX_BATCH, Recognizer, make_decoder, read_job


class Recognize(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._decode = make_decoder(read_job())
        self._recognizer = Recognizer(read_job())

    # LitServe reads these annotations, so they must not be strings (`from __future__ import annotations`).
    def decode_request(self, request: Request) -> Any:
        form: Any = request
        return self._decode(form["image"].file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        return list(inputs)

    def predict(self, pixels: list[Any]) -> list[dict[str, Any]]:
        return self._recognizer.recognize(pixels)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> Any:
        return output


def main() -> None:
    """Serve on the port given on the command line."""
    api = Recognize(max_batch_size=MAX_BATCH, batch_timeout=0.005)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
