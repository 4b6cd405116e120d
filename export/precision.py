"""Reduced-precision image encoders: float16 for queries on a GPU, int8 for queries on a CPU. The cost is measured.

int8 uses ONNX Runtime's static quantisation, with activations u8 and weights s8 per channel. Ranges are the mean of the
batches' minima and maxima, which a few extreme values do not stretch (docs/experiments.md compares the methods).

Shapes: B batch, N images, P patches, C patch channels, D embedding width, H = W = size_px.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from tqdm import tqdm

from core.arrays import Pixels
from core.errors import EncoderSpecError, UserError
from core.files import atomic_write, sync
from core.runtime import onnxruntime
from core.statistics import Reservoir
from export.config import ExportConfig
from export.model import ExportModel
from export.onnx import (
    INPUT,
    MIN_COSINE,
    OUTPUTS,
    Normalised,
    compare,
    export_normalised,
    fold_centre,
    is_large,
    measure_parity,
    quiet,
    torch_module,
)
from export.queries import catalog_images, read_queries, row_of
from export.shards import EntityImages
from imaging import Preprocessing, normalise
from index.manifest import FLOAT16_ENCODER_FILE, IMAGE_ENCODER_FILE, INT8_ENCODER_FILE, Float16Entry, Int8Entry
from index.search import EntityIndex
from index.store import EntityStore
from model.encoders import ImageEncoder

MIN_MEAN_COSINE = 0.9  # an int8 encoder below it is refused
_MAX_QUERIES = 1000
_BATCH = 32
_QUANTISED_OPERATORS = ["Conv", "MatMul", "Gemm"]

LabelledImage = tuple[int, Pixels]  # row of the right entity (-1: none) and pixels [H, W, 3]


class InFloat16(nn.Module):
    """A float16 copy of an image encoder's module on the CPU, in evaluation mode, with float32 input and outputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # deepcopy takes these tensors instead of copying the originals, because a float32 copy may need 30 GB.
        halves: dict[int, Any] = {
            id(parameter): nn.Parameter(_half(parameter), requires_grad=False) for parameter in module.parameters()
        }
        halves.update({id(buffer): _half(buffer) for buffer in module.buffers()})
        self.module = copy.deepcopy(module, halves).eval()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patch_tokens_BPC, image_embedding_BD = self.module(pixel_values.half())
        return patch_tokens_BPC.float(), image_embedding_BD.float()


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)


def add_float16(encoder: ImageEncoder, bundle: Path, centre_D: torch.Tensor | None = None) -> Float16Entry:
    """Write `image_encoder.float16.onnx` and return its parity with the encoder.

    On a CPU, ONNX Runtime computes the file in float32, where nothing overflows. So ONNX Runtime checks the file's
    operators, torch checks the float16 arithmetic, and the worse parity counts. Raises `EncoderSpecError` if a
    cosine is below 0.999, a value is not finite, or the encoder is an ONNX file.
    """
    path = bundle / FLOAT16_ENCODER_FILE
    module = Normalised(InFloat16(torch_module(encoder)))

    @torch.no_grad()
    def run(pixels_B3HW: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        patch_tokens_BPC, embedding_BD = module(torch.from_numpy(pixels_B3HW))
        if centre_D is not None:
            embedding_BD = embedding_BD - centre_D.cpu()
        return embedding_BD.numpy(), patch_tokens_BPC.numpy()

    parity = compare(encoder, run, centre_D)
    if parity.holds(MIN_COSINE):
        export_normalised(module, encoder.preprocessing.size_px, path)
        if centre_D is not None:
            fold_centre(path, centre_D)
        parity = parity.with_worst_of(measure_parity(encoder, path, centre_D))
    if not parity.holds(MIN_COSINE):
        raise EncoderSpecError(
            f"the encoder loses too much in float16: minimum cosine {parity.min_cosine:.6f} to its own embeddings, "
            f"required {MIN_COSINE}; continue with --resume, without --float16"
        )
    return Float16Entry(file=FLOAT16_ENCODER_FILE, **asdict(parity))


def write_int8(
    config: ExportConfig, model: ExportModel, bundle: Path, sample: Sequence[EntityImages]
) -> tuple[int, list[LabelledImage]]:
    """Write `image_encoder.int8.onnx` into a bundle with an encoder.

    Return how many images of the sample calibrated the ranges, every other one, and the images to measure the cost on.
    Raises `UserError` if the sample has no usable image.
    """
    preprocessing = model.image_encoder.preprocessing
    images = list(catalog_images(config, preprocessing, sample))
    if not images:
        raise UserError("--int8 needs catalog images, and none is usable; continue with --resume, without --int8")
    calibration = [pixels for _, pixels in images[::2]]
    quantise(
        bundle / IMAGE_ENCODER_FILE, bundle / INT8_ENCODER_FILE, calibration, preprocessing, progress=config.progress
    )
    return len(calibration), images[1::2] or images


def measure_int8(
    config: ExportConfig,
    model: ExportModel,
    bundle: Path,
    written: tuple[int, list[LabelledImage]],
    index: EntityIndex,
    store: EntityStore,
) -> Int8Entry:
    """Measure what the int8 encoder of a bundle with index and store costs, given what `write_int8` returned.

    Raises `EncoderSpecError` if it is too inaccurate.
    """
    preprocessing = model.image_encoder.preprocessing
    calibrated_on, judged = written
    judged_on = "catalog images"
    if config.validation is not None:
        sample: Reservoir[tuple[str, Pixels]] = Reservoir(_MAX_QUERIES)
        for entity_id, image in read_queries(config.validation, preprocessing, lambda rejected: None):
            sample.add((entity_id, np.asarray(image, np.uint8)))  # without embeddings, all are pixels
        if sample.items:
            judged_on = "validation queries"
            judged = [(row_of(entity_id, store), pixels_HW3) for entity_id, pixels_HW3 in sample.items]
    own_N = np.array([row for row, _ in judged])
    images = [pixels_HW3 for _, pixels_HW3 in judged]

    def embed(file: str, step: str) -> npt.NDArray[np.float32]:
        """Return embeddings [N, D], L2-normalised."""
        session = onnxruntime.InferenceSession(str(bundle / file), providers=["CPUExecutionProvider"])
        batches = _batches(images, preprocessing, step, progress=config.progress)
        all_ND: npt.NDArray[np.float32] = np.concatenate([session.run([OUTPUTS[1]], inputs)[0] for inputs in batches])
        all_ND /= np.linalg.norm(all_ND, axis=1, keepdims=True)
        return all_ND

    float_ND = embed(IMAGE_ENCODER_FILE, "int8: float32 embeddings")
    int8_ND = embed(INT8_ENCODER_FILE, "int8: int8 embeddings")
    cosines_N = (float_ND * int8_ND).sum(axis=1)
    float_N, int8_N = (index.search(embeddings_ND, 1)[0][:, 0] for embeddings_ND in (float_ND, int8_ND))
    mean_cosine = round(float(cosines_N.mean()), 6)
    if not mean_cosine >= MIN_MEAN_COSINE:
        raise EncoderSpecError(
            f"the encoder loses too much in int8: mean cosine {mean_cosine:.3f} to its own embeddings, "
            f"required {MIN_MEAN_COSINE}; continue with --resume, without --int8"
        )
    return Int8Entry(
        file=INT8_ENCODER_FILE,
        calibrated_on=calibrated_on,
        judged_on=judged_on,
        images=len(judged),
        min_cosine=round(float(cosines_N.min()), 6),
        mean_cosine=mean_cosine,
        same_top_1=_percent(float_N == int8_N),
        top_1_float=_percent(float_N == own_N),
        top_1_int8=_percent(int8_N == own_N),
    )


def quantise(
    source: Path,
    target: Path,
    images: Sequence[Pixels],
    preprocessing: Preprocessing,
    *,
    progress: bool = False,
) -> None:
    """Write the ONNX file `source` in int8, calibrated on some images. The same inputs give the same bytes."""
    from onnxruntime.quantization import QuantType, quantize_static  # onnxruntime itself is configured above
    from onnxruntime.quantization.shape_inference import quant_pre_process

    large = is_large(source)
    batches = _batches(images, preprocessing, "int8 ranges", progress=progress)
    with TemporaryDirectory(prefix="quantise.") as folder, quiet():
        prepared, quantised = Path(folder) / "prepared.onnx", Path(folder) / "quantised.onnx"
        # This makes float16 weights float32 constants, and folds the scales of norms into the weights.
        quant_pre_process(source, prepared, skip_symbolic_shape=True, save_as_external_data=large)
        quantize_static(
            prepared,
            quantised,
            SimpleNamespace(get_next=lambda: next(batches, None)),
            op_types_to_quantize=_QUANTISED_OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            extra_options={"CalibMovingAverage": True},
            reduce_range=True,  # weights of 7 bits: with 8, sums saturate on CPUs without VNNI
        )
        model = onnx.load(quantised)
    model.producer_name, model.producer_version = "", ""
    del model.metadata_props[:]
    if large:
        data = target.with_name(f"{target.name}.data")
        data.unlink(missing_ok=True)  # onnx appends to an existing file
        onnx.external_data_helper.convert_model_to_external_data(model, location=data.name, size_threshold=1024)
        onnx.external_data_helper.write_external_data_tensors(model, str(target.parent))
        sync(data)
    with atomic_write(target) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _batches(
    images: Sequence[Pixels], preprocessing: Preprocessing, step: str, *, progress: bool
) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    """Yield images as inputs of an encoder, in batches."""
    for start in tqdm(range(0, len(images), _BATCH), desc=step, unit="batch", disable=not progress):
        yield {INPUT: normalise(np.stack(images[start : start + _BATCH]), preprocessing)}


def _percent(hits_N: npt.NDArray[np.bool_]) -> float:
    return round(100 * float(hits_N.mean()), 2)
