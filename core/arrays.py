"""Types of arrays, and their normalisation. The names of variables give the axes, as in `pixels_BHW3`."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]


class Device(NamedTuple):
    """A device of ONNX Runtime: `cpu`, or `cuda` with a number."""

    kind: str
    number: int = 0


class DeviceArray:
    """Query embeddings [B, D] that an encoder left on a device. `np.asarray` copies them to the host, once."""

    def __init__(self, value: Any, device: Device, to_host: Callable[[], Float32Array]) -> None:
        """`value` is ONNX Runtime's `OrtValue`, `to_host` returns the embeddings on the host."""
        self.value = value
        self.device = device
        self._to_host = to_host

    def __len__(self) -> int:
        return int(self.value.shape()[0])

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self._on_host, dtype, copy=copy)

    @cached_property
    def _on_host(self) -> Float32Array:
        return self._to_host()


Queries = Float32Array | DeviceArray  # embeddings [B, D]


def combined(views_VD: Float32Array) -> Float32Array:
    """Return the embedding [D] of several photographs of one thing: the normalised mean of theirs.

    Rounding depends on their order.
    """
    mean_D: Float32Array = views_VD.mean(axis=0, dtype=np.float64).astype(np.float32)
    return normalised(mean_D[None]).reshape(-1)


def normalised(vectors_nD: Float16Array | Float32Array) -> Float32Array:
    """Return the vectors as float32 with length 1. Zero vectors stay zero."""
    embeddings_nD = vectors_nD.astype(np.float32)
    embeddings_nD /= np.maximum(np.linalg.norm(embeddings_nD, axis=1, keepdims=True), np.float32(1e-12))
    return embeddings_nD
