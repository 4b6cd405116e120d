"""Batches of a few sizes, bound to buffers that are kept: what a GPU wants, which plans anew for each shape it meets.

Shapes: B batch, S bucket size, H/W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Float32Array = npt.NDArray[np.float32]


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes to run: powers of two up to `max_batch`, and that. At most half of a batch is padding."""
    powers = (2**power for power in range(max_batch.bit_length()))
    return tuple(sorted({*(size for size in powers if size < max_batch), max_batch}))


def bucket_of(count: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds `count`, the largest where none does."""
    return next((size for size in sizes if size >= count), sizes[-1])


class BucketedRuns:
    """Runs a session with batches padded to the next bucket, through input buffers that stay on the device.

    The first run of a size is slow (`warm_up` does it). Safe for several threads: a buffer serves one at a time.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        input_name: str,
        image_shape: tuple[int, int, int],
        *,
        max_batch: int,
        device: str,
    ) -> None:
        self.sizes = bucket_sizes(max_batch)
        self._session = session
        self._input_name = input_name
        self._image_shape = image_shape
        self._device = device
        self._buffers: dict[int, Any] = {}  # of ONNX Runtime's, on the device, by bucket size
        self._bindings: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    def warm_up(self, output_name: str) -> None:
        """Run each size once, the largest first, so that memory is taken from the device once."""
        for size in reversed(self.sizes):
            self.run(output_name, np.zeros((size, *self._image_shape), np.float32))

    def run(self, output_name: str, pixels_B3HW: Float32Array) -> Float32Array:
        """The output float32 `[B, ...]` for any number of images; more than the largest bucket go in several runs."""
        largest = self.sizes[-1]
        with self._lock:
            parts = [
                self._run_one(output_name, pixels_B3HW[start : start + largest])
                for start in range(0, len(pixels_B3HW), largest)
            ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run_one(self, output_name: str, pixels_B3HW: Float32Array) -> Float32Array:
        size = bucket_of(len(pixels_B3HW), self.sizes)
        padded_S3HW = pixels_B3HW
        if len(pixels_B3HW) < size:
            padded_S3HW = np.zeros((size, *self._image_shape), np.float32)
            padded_S3HW[: len(pixels_B3HW)] = pixels_B3HW
        binding = self._binding(output_name, size)
        self._buffers[size].update_inplace(np.ascontiguousarray(padded_S3HW))
        self._session.run_with_iobinding(binding)
        (output,) = binding.copy_outputs_to_cpu()
        return np.asarray(output[: len(pixels_B3HW)], np.float32)

    def _binding(self, output_name: str, size: int) -> Any:
        """Bound once: addresses and shapes of a bucket never change after that."""
        if size not in self._buffers:
            blank_S3HW = np.zeros((size, *self._image_shape), np.float32)
            self._buffers[size] = onnxruntime.OrtValue.ortvalue_from_numpy(blank_S3HW, self._device, 0)
        if (output_name, size) not in self._bindings:
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(self._input_name, self._buffers[size])
            binding.bind_output(output_name, self._device)
            self._bindings[output_name, size] = binding
        return self._bindings[output_name, size]
