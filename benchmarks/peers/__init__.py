"""The work that every peer does for an image: decode, encode, search. Runs in the peers' own environments.

A peer's environment has numpy, Pillow, ONNX Runtime and faiss. Of this project it can import `core.runtime`, and
`imaging` where it uses our decoder. The environment variable `PEER_JOB` names a JSON file with the job of a server.

Shapes: B batch, H/W pixels, K results.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from core.runtime import faiss, onnxruntime

TOP_K = 5
MAX_BATCH = 32

Pixels = npt.NDArray[np.float32]
Job = dict[str, Any]


def read_job() -> Job:
    """Return the job: `onnx`, `vectors`, `ids`, `preprocessing`, `decoder`, `threads`, `cores` and more."""
    job: Job = json.loads(Path(os.environ["PEER_JOB"]).read_bytes())
    return job


def make_decoder(job: Job) -> Callable[[bytes], Pixels]:
    """Return a function from the bytes of an image to normalised pixels [3, H, W]."""
    if job["decoder"] == "own":
        return lambda data: preprocess(Image.open(io.BytesIO(data)), job["preprocessing"])

    from imaging import Preprocessing, load_pixels, normalise

    preprocessing = Preprocessing.from_dict(job["preprocessing"])

    def decode(data: bytes) -> Pixels:
        pixels_HW3 = load_pixels(data, preprocessing, max_pixels=64_000_000)
        pixels_3HW: Pixels = normalise(pixels_HW3[None], preprocessing)[0]
        return pixels_3HW

    return decode


def preprocess(image: Image.Image, preprocessing: dict[str, Any]) -> Pixels:
    """Resize, crop and normalise the fully decoded image, as the examples of the peers do."""
    resampling = getattr(Image.Resampling, preprocessing["interpolation"].upper())
    size_px = preprocessing["size_px"]
    image = image.convert("RGB")
    if preprocessing["resize"] == "squash":
        image = image.resize((size_px, size_px), resampling)
    else:
        scale = size_px / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
        left, top = (image.width - size_px) // 2, (image.height - size_px) // 2
        image = image.crop((left, top, left + size_px, top + size_px))
    pixels_HW3 = np.asarray(image, np.float32) / 255
    mean, std = (np.array(preprocessing[name], np.float32) for name in ("mean", "std"))
    return np.ascontiguousarray(((pixels_HW3 - mean) / std).transpose(2, 0, 1))


class Recognizer:
    """The ONNX file, and a flat faiss index over the bundle's vectors, with the threads of the job."""

    def __init__(self, job: Job) -> None:
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
