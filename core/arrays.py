"""Types of numpy arrays, and their normalisation. The names of variables give the axes, as in `pixels_BHW3`."""

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]


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
