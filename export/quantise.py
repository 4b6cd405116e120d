"""An image encoder's ONNX file in int8, for CPUs: activations u8, weights s8 per channel, ranges measured on images.

ONNX Runtime's static quantisation. Ranges are the means of the batches' least and largest values: a few extreme values
do not stretch them (docs/LOG.md has what the other ways gave).

Shapes: B batch, H = W = size_px.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from core.files import atomic_write, sync
from export import onnx_export
from imaging import Preprocessing, normalise

CALIBRATION_BATCH = 32
_OPERATORS = ["Conv", "MatMul", "Gemm"]


def quantise(
    source: Path,
    target: Path,
    pixels_BHW3: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    *,
    input_name: str,
    on_images: Callable[[int], object] = lambda images: None,
) -> None:
    """Write `target`, the file `source` in int8, and its data beside it where that is too large for one file.

    The same source and images give the same bytes. `pixels_BHW3` are what ranges are taken from, in batches of 32;
    `on_images` is told how many of each.
    """
    from onnxruntime.quantization import QuantType, quantize_static  # export.onnx_export has loaded and configured it
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large = onnx_export.is_large(source)
    with TemporaryDirectory(prefix="quantise.") as folder, _quiet():
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        # Weights that are stored in float16 become float32 constants here, and scales of norms part of the weights.
        quant_pre_process(source, prepared, skip_symbolic_shape=True, save_as_external_data=large)
        quantize_static(
            prepared,
            quantised,
            _Images(pixels_BHW3, preprocessing, input_name, on_images),
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            extra_options={"CalibMovingAverage": True},
        )
        _save(onnx.load(quantised), target, large=large)


class _Images:
    """Batches of normalised images, as `onnxruntime.quantization.CalibrationDataReader` gives them."""

    def __init__(
        self,
        pixels_BHW3: npt.NDArray[np.uint8],
        preprocessing: Preprocessing,
        input_name: str,
        on_images: Callable[[int], object],
    ) -> None:
        self._pixels_BHW3, self._preprocessing = pixels_BHW3, preprocessing
        self._input_name, self._on_images = input_name, on_images
        self._starts = iter(range(0, len(pixels_BHW3), CALIBRATION_BATCH))

    def get_next(self) -> Any:
        start = next(self._starts, None)
        if start is None:
            return None
        batch_BHW3 = self._pixels_BHW3[start : start + CALIBRATION_BATCH]
        self._on_images(len(batch_BHW3))
        return {self._input_name: normalise(batch_BHW3, self._preprocessing)}


def _save(model: onnx.ModelProto, target: Path, *, large: bool) -> None:
    model.producer_name, model.producer_version = "", ""
    del model.metadata_props[:]
    if large:
        data = target.with_name(f"{target.name}.data")
        data.unlink(missing_ok=True)  # onnx appends to what is there
        onnx.external_data_helper.convert_model_to_external_data(model, location=data.name, size_threshold=1024)
        onnx.external_data_helper.write_external_data_tensors(model, str(target.parent))
        sync(data)
    with atomic_write(target) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """It recommends what was done already, and tells of types that it need not know."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
