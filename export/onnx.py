"""Export the image encoder to ONNX (or copy it if it is an ONNX file), and measure its parity with the original.

Shapes: B batch, P patches, C patch channels, D embedding width, H = W = size_px.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import EncoderSpecError
from core.files import atomic_write, atomic_write_bytes, sync
from core.runtime import onnxruntime
from imaging import normalise
from index.manifest import IMAGE_ENCODER_FILE
from model.encoders import ImageEncoder, ImageFeatures
from model.encoders.onnx import copy_onnx, external_data

INPUT = "pixel_values"
OUTPUTS = ("patch_tokens", "image_embedding")
MIN_COSINE = 0.999
HALF_MIN_COSINE = 0.9999  # weights are stored in float16 only if every sample embedding stays this close
_HALVED_FROM_VALUES = 1024  # smaller tensors are biases and norms
_BATCHES = (1, 2, 5)
EXTERNAL_FROM_BYTES = 1_500_000_000  # larger weights get a file of their own, because protobuf is limited to 2 GB

# Pixel values [B, 3, H, W] to image embeddings [B, D] and, if there are any, patch tokens [B, P, C].
Run = Callable[[npt.NDArray[np.float32]], Sequence[npt.NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The largest difference of patch tokens and embeddings from the original encoder, over a few batches."""

    max_abs_diff: float
    min_cosine: float  # of image embeddings

    def holds(self, min_cosine: float) -> bool:
        """Return whether every cosine is at least `min_cosine` and every value finite."""
        return math.isfinite(self.max_abs_diff) and self.min_cosine >= min_cosine

    def with_worst_of(self, other: Parity) -> Parity:
        """Return the larger difference and the smaller cosine of the two."""
        return Parity(
            max_abs_diff=float(np.maximum(self.max_abs_diff, other.max_abs_diff)),
            min_cosine=float(np.minimum(self.min_cosine, other.min_cosine)),
        )


def export_image_encoder(
    encoder: ImageEncoder, folder: Path, *, half: bool = False, centre_D: torch.Tensor | None = None
) -> Parity:
    """Write `image_encoder.onnx`, with external data if it is large. The same encoder gives the same bytes.

    `half` stores the weights in float16 if that changes no embedding. `centre_D` is subtracted from the normalised
    image embedding, which is then normalised again.
    Raises `EncoderSpecError` if the encoder cannot be exported, or if a cosine to the original is below 0.999.
    """
    path = folder / IMAGE_ENCODER_FILE
    source: Path | None = getattr(encoder, "onnx_path", None)
    if source is not None:
        copy_onnx(source, path)
    else:
        copied = copy.deepcopy(torch_module(encoder)).to("cpu", torch.float32)  # the encoder itself is still in use
        export_normalised(Normalised(copied), encoder.preprocessing.size_px, path)
        if half:
            _halve_weights(encoder, path)
    if centre_D is not None:
        fold_centre(path, centre_D)
    parity = measure_parity(encoder, path, centre_D)
    if not parity.holds(MIN_COSINE):
        raise EncoderSpecError(
            f"the ONNX file of {encoder.spec} differs from the original: minimum cosine {parity.min_cosine:.6f}, "
            f"required {MIN_COSINE}; export it by hand and give it as onnx:PATH"
        )
    return parity


def output_names(encoder: ImageEncoder) -> tuple[str | None, str]:
    """Return the names of the outputs: patch tokens (None if the encoder has none) and image embedding."""
    patches, embedding = OUTPUTS
    return (patches if encoder.patches else None), embedding


def torch_module(encoder: ImageEncoder) -> nn.Module:
    """Return the torch module of an encoder. Raises `EncoderSpecError` if it is an ONNX file."""
    module: nn.Module | None = getattr(encoder, "module", None)
    if module is None:
        raise EncoderSpecError(
            f"--float16 needs an image encoder in torch, but {encoder.spec} is an ONNX file; omit --float16, or "
            "convert the file by hand (float32 inputs and outputs), and train and export with the result"
        )
    return module


def measure_parity(encoder: ImageEncoder, path: Path, centre_D: torch.Tensor | None = None) -> Parity:
    """Compare an ONNX file with its encoder on synthetic images, in batches of 1, 2 and 5."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [name for name in reversed(output_names(encoder)) if name is not None]

    def run(pixels_B3HW: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        outputs: Sequence[npt.NDArray[np.float32]] = session.run(names, {INPUT: pixels_B3HW})
        return outputs

    return compare(encoder, run, centre_D)


def compare(encoder: ImageEncoder, run: Run, centre_D: torch.Tensor | None = None) -> Parity:
    """Compare the outputs of `run` with the encoder's. NaN counts as the worst value."""
    parity = Parity(max_abs_diff=0.0, min_cosine=1.0)
    for batch in _BATCHES:
        pixels_BHW3 = _sample_pixels(batch, encoder.preprocessing.size_px)
        expected: ImageFeatures = encoder.encode(pixels_BHW3)
        embedding_BD, *tokens = map(torch.from_numpy, run(normalise(pixels_BHW3, encoder.preprocessing)))
        embedding_BD = F.normalize(embedding_BD.double(), dim=1)
        expected_BD = expected.image_embedding_BD.cpu()
        if centre_D is not None:
            expected_BD = F.normalize(expected_BD - centre_D.cpu(), dim=1)
        min_cosine = float((embedding_BD * F.normalize(expected_BD.double(), dim=1)).sum(1).min())
        compared = [(embedding_BD, expected_BD), *((found, expected.patch_tokens_BPC.cpu()) for found in tokens)]
        for found, exact in compared:
            max_abs_diff = float((found.double() - exact.double()).abs().max())
            parity = parity.with_worst_of(Parity(max_abs_diff=max_abs_diff, min_cosine=min_cosine))
    return Parity(max_abs_diff=float(f"{parity.max_abs_diff:.2g}"), min_cosine=round(parity.min_cosine, 6))


class Normalised(nn.Module):
    """An encoder's module with float32 outputs and L2-normalised embeddings."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patch_tokens_BPC, image_embedding_BD = self.module(pixel_values)
        return patch_tokens_BPC.float(), F.normalize(image_embedding_BD.float(), dim=1)


def export_normalised(module: Normalised, size_px: int, path: Path) -> None:
    """Write the ONNX file of an image encoder on the CPU."""
    # A batch of two, because the exporter treats a dimension of 1 as fixed.
    example = torch.zeros(2, 3, size_px, size_px)
    export_module(
        module.eval(),
        (example,),
        path,
        inputs=(INPUT,),
        outputs=OUTPUTS,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def export_module(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[Mapping[int, Any], ...],
) -> None:
    """Write a module in evaluation mode, on the CPU, as an ONNX file, with external data if it is large."""
    with quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            example,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            dynamo=True,
            verbose=False,
        )
    _strip(program.model)
    if sum(parameter.nbytes for parameter in module.parameters()) > EXTERNAL_FROM_BYTES:
        program.save(str(path), external_data=True)
        for file in (path.with_name(f"{path.name}.data"), path):
            sync(file)
    else:
        with atomic_write(path) as temporary:
            program.save(str(temporary), external_data=False)


def stored_bytes(encoder: ImageEncoder, *, half: bool) -> int:
    """Estimate the size of `image_encoder.onnx` with its data, from its weights."""
    source: Path | None = getattr(encoder, "onnx_path", None)
    if source is not None:
        return sum(file.stat().st_size for file in (source, *external_data(source)))
    values = sum(parameter.numel() for parameter in torch_module(encoder).parameters())
    return values * (2 if half and 4 * values <= EXTERNAL_FROM_BYTES else 4)


def is_large(path: Path) -> bool:
    """Return whether an ONNX file, or one made from it, needs external data."""
    return sum(file.stat().st_size for file in (path, *external_data(path))) > EXTERNAL_FROM_BYTES


def _halve_weights(encoder: ImageEncoder, path: Path) -> None:
    """Store the weights in float16, unless that changes embeddings. ONNX Runtime casts them back on loading."""
    model = onnx.load(path, load_external_data=False)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < _HALVED_FROM_VALUES:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return  # files of this size are used on GPUs
        name = tensor.name
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    halved = path.with_name(f".{path.name}.half")
    try:
        halved.write_bytes(model.SerializeToString(deterministic=True))
        if measure_parity(encoder, halved).holds(HALF_MIN_COSINE):
            atomic_write_bytes(path, halved.read_bytes())
    finally:
        halved.unlink(missing_ok=True)


def fold_centre(path: Path, centre_D: torch.Tensor) -> None:
    """Append nodes that normalise the embedding, subtract the centre and normalise again."""
    model = onnx.load(path, load_external_data=False)
    embedding = OUTPUTS[1]
    raw, normalised, centre, shifted = (f"{embedding}.{step}" for step in ("raw", "normalised", "centre", "shifted"))
    for node in model.graph.node:
        for ends in (node.input, node.output):
            ends[:] = [raw if name == embedding else name for name in ends]
    model.graph.initializer.append(onnx.numpy_helper.from_array(centre_D.float().cpu().numpy(), centre))
    model.graph.node.extend(
        [
            onnx.helper.make_node("LpNormalization", [raw], [normalised], axis=1, p=2),
            onnx.helper.make_node("Sub", [normalised, centre], [shifted]),
            onnx.helper.make_node("LpNormalization", [shifted], [embedding], axis=1, p=2),
        ]
    )
    atomic_write_bytes(path, model.SerializeToString(deterministic=True))


def _strip(model: Any) -> None:
    """Remove the exporter's metadata, such as stack traces with paths of this machine."""
    parts = [model, *model.graph.initializers.values()]
    for graph in (model.graph, *model.functions.values()):
        nodes = list(graph.all_nodes())
        parts += [graph, *graph.inputs, *nodes, *(value for node in nodes for value in node.outputs)]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the output of the ONNX tools, which print to stdout, warn and log."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _sample_pixels(batch: int, size_px: int) -> npt.NDArray[np.uint8]:
    """Return images uint8 [B, H, W, 3] with coarse and fine structure, the same ones for each batch size."""
    rng = np.random.default_rng(batch)
    coarse_BHW3 = rng.integers(0, 256, size=(batch, 4, 4, 3)).repeat(-(-size_px // 4), 1).repeat(-(-size_px // 4), 2)
    noise_BHW3 = rng.normal(0, 24, size=(batch, size_px, size_px, 3))
    pixels_BHW3: npt.NDArray[np.uint8] = (coarse_BHW3[:, :size_px, :size_px] + noise_BHW3).clip(0, 255).astype(np.uint8)
    return pixels_BHW3
