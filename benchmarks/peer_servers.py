"""LitServe, mosec and BentoML as their examples use them, with the work that each does: decode, encode, search.

This file runs in the environment of one peer, which has numpy, Pillow, ONNX Runtime and faiss besides. Of this project
it can import `core.runtime` and `imaging`. The environment variable `PEER_JOB` names a JSON file with the job of the
server.

Shapes: B batch, H/W pixels, K results.
"""

import argparse
import io
import json
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from core.runtime import faiss, onnxruntime

TOP_K = 5
MAX_BATCH = 32
BATCH_TIMEOUT_MS = 5
TIMEOUT_S = 60

Pixels = npt.NDArray[np.float32]


def read_job() -> dict[str, Any]:
    """Return the job: `onnx`, `input`, `output`, `vectors`, `ids`, `preprocessing`, `decoder` and `threads`."""
    job: dict[str, Any] = json.loads(Path(os.environ["PEER_JOB"]).read_bytes())
    return job


def make_decoder(job: dict[str, Any]) -> Callable[[bytes], Pixels]:
    """Return a function from the bytes of an image to normalised pixels [3, H, W].

    The peers' own examples decode with Pillow. Our decoder decodes at a reduced scale.
    """
    from imaging import Preprocessing, load_pixels, normalise, to_pixels

    preprocessing = Preprocessing.from_dict(job["preprocessing"])

    def decode(data: bytes) -> Pixels:
        if job["decoder"] == "own":
            pixels_HW3 = to_pixels(Image.open(io.BytesIO(data)).convert("RGB"), preprocessing)
        else:
            pixels_HW3 = load_pixels(data, preprocessing)
        pixels_3HW: Pixels = normalise(pixels_HW3[None], preprocessing)[0]
        return pixels_3HW

    return decode


class Recognizer:
    """The ONNX file, and a flat faiss index over the bundle's vectors, with the threads of the job."""

    def __init__(self, job: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job["threads"]
        options.inter_op_num_threads = 1
        # As in the service: spinning threads would take the core from the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(job["onnx"], options, providers=["CPUExecutionProvider"])
        self._input, self._output = job["input"], job["output"]
        vectors_ND = np.load(job["vectors"]).astype(np.float32)
        self._index = faiss.IndexFlatIP(vectors_ND.shape[1])
        self._index.add(vectors_ND)
        faiss.omp_set_num_threads(job["threads"])
        self._ids: list[str] = json.loads(Path(job["ids"]).read_bytes())

    def recognize(self, pixels: Sequence[Pixels]) -> list[dict[str, Any]]:
        (embeddings_BD,) = self._session.run([self._output], {self._input: np.stack(pixels)})
        scores_BK, positions_BK = self._index.search(embeddings_BD, TOP_K)
        return [
            {"entities": [self._ids[position] for position in positions], "scores": [float(score) for score in scores]}
            for positions, scores in zip(positions_BK, scores_BK, strict=True)
        ]


# An environment has one of the three. They start processes of their own, which import these classes by name.

if find_spec("litserve") is not None:
    import litserve
    from fastapi import Request

    class LitServePeer(litserve.LitAPI):
        """Dynamic batching, and decoding in the worker, as in LitServe's batching example."""

        def setup(self, device: str) -> None:
            self._decode = make_decoder(read_job())
            self._recognizer = Recognizer(read_job())

        # LitServe reads these annotations, so they must not be strings (`from __future__ import annotations`).
        def decode_request(self, request: Request) -> Any:
            form: Any = request
            return self._decode(form["image"].file.read())

        def predict(self, pixels: Any) -> list[dict[str, Any]]:
            return self._recognizer.recognize(pixels)


if find_spec("mosec") is not None:
    import mosec

    class MosecDecoder(mosec.Worker):
        """One of these for each core, as in mosec's ResNet example."""

        def __init__(self) -> None:
            self._decode = make_decoder(read_job())

        def deserialize(self, data: bytes) -> bytes:
            return data

        def forward(self, data: bytes) -> Any:
            return self._decode(data)

    class MosecRecognizer(mosec.Worker):
        """The stage that batches."""

        def __init__(self) -> None:
            self._recognizer = Recognizer(read_job())

        def forward(self, data: list[Any]) -> list[dict[str, Any]]:
            return self._recognizer.recognize(data)


if find_spec("bentoml") is not None:
    import bentoml

    @bentoml.service(
        workers=1, threads=read_job()["threads"], traffic={"timeout": TIMEOUT_S}, metrics={"enabled": False}
    )
    class BentomlPeer:
        """A method that takes an image, as in BentoML's examples, with one thread per core."""

        def __init__(self) -> None:
            self._decode = make_decoder(read_job())
            self._recognizer = Recognizer(read_job())

        @bentoml.api
        def predict(self, image: Path) -> dict[str, Any]:
            return self._recognizer.recognize([self._decode(image.read_bytes())])[0]


def main() -> None:
    """Run LitServe or mosec. BentoML has its own command."""
    if find_spec("mosec") is not None:
        server = mosec.Server()  # it reads `--port` and `--address` itself
        server.append_worker(MosecDecoder, num=read_job()["threads"], timeout=TIMEOUT_S)
        server.append_worker(
            MosecRecognizer, num=1, max_batch_size=MAX_BATCH, max_wait_time=BATCH_TIMEOUT_MS, timeout=TIMEOUT_S
        )
        server.run()
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--port", type=int)
        parser.add_argument("--address")
        flags = parser.parse_args()
        api = LitServePeer(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_MS / 1000)
        server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=TIMEOUT_S)
        server.run(host=flags.address, port=flags.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
