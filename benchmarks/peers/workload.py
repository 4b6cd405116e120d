"""What every server does with an image here: decode, encode, search. Runs in the peers' own environments.

A peer's environment has numpy, Pillow, ONNX Runtime and faiss; of this project it sees `imaging` only, and only where
it is given our decoder. Where the files are and how many threads to use comes in `PEER_JOB`, a JSON file.

Shapes: B batch, H/W pixels, K results.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from core.runtime import faiss, onnxruntime

TOP_K = 5
MAX_BATCH = 32

Pixels = npt.NDArray[np.float32]


def job() -> dict[str, Any]:
    """What this server is to do: `onnx`, `vectors`, `ids`, `preprocessing`, `decoder`, `threads`, `cores`, ..."""
    read: dict[str, Any] = json.loads(Path(os.environ["PEER_JOB"]).read_bytes())
    return read


def decoder(wanted: dict[str, Any]) -> Any:
    """A function from a file's bytes to float32 `[3, H, W]`."""
    if wanted["decoder"] == "ours":
        from imaging import Preprocessing, load_pixels, normalise

        preprocessing = Preprocessing.from_dict(wanted["preprocessing"])

        def ours(data: bytes) -> Pixels:
            pixels_HW3 = load_pixels(data, preprocessing, max_pixels=64_000_000)
            pixels_3HW: Pixels = normalise(pixels_HW3[None], preprocessing)[0]
            return pixels_3HW

        return ours

    return lambda data: as_pixels(Image.open(io.BytesIO(data)), wanted["preprocessing"])


def as_pixels(image: Image.Image, preprocessing: dict[str, Any]) -> Pixels:
    """The preprocessing as examples write it: all of the image is decoded, then resized, cropped and normalised."""
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


class Recogniser:
    """The ONNX file and a flat faiss index over the bundle's vectors, with the threads of the job."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = wanted["threads"]
        options.inter_op_num_threads = 1
        # As the service has it: spinning threads would take the core from whoever decodes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(wanted["onnx"], options, providers=["CPUExecutionProvider"])
        self._input, self._output = wanted["input"], wanted["output"]
        vectors_ND = np.load(wanted["vectors"]).astype(np.float32)
        self._index = faiss.IndexFlatIP(vectors_ND.shape[1])
        self._index.add(vectors_ND)
        faiss.omp_set_num_threads(wanted["threads"])
        self._ids: list[str] = json.loads(Path(wanted["ids"]).read_bytes())

    def recognise(self, pixels: Sequence[Pixels]) -> list[dict[str, Any]]:
        (embeddings_BD,) = self._session.run([self._output], {self._input: np.stack(pixels)})
        scores_BK, places_BK = self._index.search(embeddings_BD, TOP_K)
        return [
            {"entities": [self._ids[place] for place in places], "scores": [float(score) for score in scores]}
            for places, scores in zip(places_BK, scores_BK, strict=True)
        ]
