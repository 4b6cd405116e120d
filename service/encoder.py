"""The bundle's image encoder on ONNX Runtime.

On a GPU, the pixels of queries are normalised there, and embeddings stay there for `index.graph`.

Shapes: B batch, H/W pixels, P patches, C patch channels, D embedding width.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from core.arrays import Device as OrtDevice
from core.arrays import DeviceArray, Float32Array, Pixels, Queries
from core.errors import BundleAltered, UserError, first_line, needed_by
from core.runtime import load_cuda_libraries, onnxruntime, session_options
from imaging import Preprocessing, normalise
from imaging.preprocess import normalised_values
from index.bundle import Bundle
from index.graph import make_model, open_graph
from service.settings import Device, Settings

if TYPE_CHECKING:
    from onnx import ModelProto

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_FASTEST_PRECISION = {"cpu": "int8", "cuda": "float16"}
_ROUNDING = 1e-3  # of the length of a normalised embedding, in float16 too

log = logging.getLogger("wikiclip.encoder")


class OnnxEncoder:
    """Turns pixels into query embeddings. `patches_name` is None for an encoder without patch tokens.

    On a GPU it runs a batch of `max_batch` once, so that all memory is allocated at the start.

    Raises `UserError` if CUDA is requested and does not work, `BundleAltered` if the file is not such an encoder.
    """

    def __init__(
        self,
        path: Path,
        preprocessing: Preprocessing,
        *,
        input_name: str,
        patches_name: str | None,
        embedding_name: str,
        embedding_dim: int,
        device: Device,
        threads: int,
        max_batch: int = 32,
        stay_on_device: bool = False,
    ) -> None:
        self.file = path.name
        self.preprocessing = preprocessing
        self._input_name = input_name
        self._patches_name = patches_name
        self._embedding_name = embedding_name
        self._session = open_session(path, device, threads)
        self.device = "cuda" if _CUDA in self._session.get_providers() else "cpu"
        self._pixels_session: onnxruntime.InferenceSession | None = None
        if stay_on_device or self.device == "cuda":
            self._pixels_session = open_graph(pixels_graph(preprocessing), OrtDevice(self.device))
        inputs = {node.name for node in self._session.get_inputs()}
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        expected = [name for name in (patches_name, embedding_name) if name is not None]
        if input_name not in inputs or not outputs.keys() >= set(expected):
            raise BundleAltered(
                f"{path} lacks the input {input_name!r} or an output, {' or '.join(map(repr, expected))}; "
                "export it again"
            )
        patch_dim = 0 if patches_name is None else outputs[patches_name][-1]
        self.heat_maps = patch_dim == embedding_dim or not isinstance(patch_dim, int)
        # The first pass allocates memory and is slow. No request should wait for it.
        blank_BHW3 = np.zeros((max_batch, preprocessing.size_px, preprocessing.size_px, 3), np.uint8)
        if self.device == "cuda":
            self.encode(blank_BHW3)
        shape = np.asarray(self.encode(blank_BHW3[:1])).shape
        if shape != (1, embedding_dim):
            raise BundleAltered(
                f"{path} outputs embeddings of shape {shape}, but the manifest says width {embedding_dim}; export again"
            )

    def encode(self, pixels_BHW3: Pixels) -> Queries:
        """Return the L2-normalised embeddings [B, D]. Thread-safe."""
        if self._pixels_session is None:
            return _unit_length(self._run(self._embedding_name, pixels_BHW3))
        binding = self._pixels_session.io_binding()
        binding.bind_cpu_input("pixels", pixels_BHW3)
        pixel_values = self._run_bound(self._pixels_session, binding, "pixel_values")
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input_name, pixel_values)
        value = self._run_bound(self._session, binding, self._embedding_name)
        return DeviceArray(value, OrtDevice(self.device), lambda: _unit_length(value.numpy()))

    def patch_tokens(self, pixels_BHW3: Pixels) -> Float32Array:
        """Return the patch tokens [B, P, C]. Thread-safe."""
        assert self._patches_name is not None
        return self._run(self._patches_name, pixels_BHW3)

    def _run(self, output_name: str, pixels_BHW3: Pixels) -> Float32Array:
        pixels_B3HW = normalise(pixels_BHW3, self.preprocessing)
        (output,) = self._session.run([output_name], {self._input_name: pixels_B3HW})
        return np.asarray(output, np.float32)

    def _run_bound(self, session: Any, binding: Any, output_name: str) -> onnxruntime.OrtValue:
        binding.bind_output(output_name, self.device)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]


def _unit_length(embeddings_BD: npt.NDArray[Any]) -> Float32Array:
    """Return the embeddings with length 1. An `onnx:` encoder in a bundle need not normalise them."""
    embeddings_BD = np.asarray(embeddings_BD, np.float32)
    lengths_B1 = np.linalg.norm(embeddings_BD, axis=1, keepdims=True)
    # Not those that are normalised up to rounding: their last digits, and so the answers, would change.
    lengths_B1[(np.abs(lengths_B1 - 1) < _ROUNDING) | (lengths_B1 == 0)] = 1
    unit_BD: Float32Array = embeddings_BD / lengths_B1
    return unit_BD


def pixels_graph(preprocessing: Preprocessing) -> ModelProto:
    """Build the graph that does what `imaging.normalise` does: `pixels` uint8 [B, H, W, 3] to `pixel_values`."""
    with needed_by("an image encoder on a GPU"):
        from onnx import TensorProto, helper, numpy_helper
    nodes = [
        helper.make_node("Transpose", ["pixels"], ["channels"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["channels"], ["bytes"], to=TensorProto.INT32),
        helper.make_node("Add", ["bytes", "starts"], ["places"]),
        helper.make_node("Gather", ["values", "places"], ["pixel_values"]),
    ]
    constants = {
        "starts": np.array([0, 256, 512], np.int32).reshape(3, 1, 1),
        "values": normalised_values(preprocessing).reshape(-1),
    }
    size_px = preprocessing.size_px
    graph = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["B", size_px, size_px, 3])],
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["B", 3, size_px, size_px])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return make_model(graph)


def open_encoder(bundle: Bundle, preprocessing: Preprocessing, settings: Settings) -> OnnxEncoder:
    """Open the bundle's image encoder in the precision that is fastest on the device, if the bundle has it."""
    encoder = _open_file(bundle, _file_for(bundle, settings, expected_device(settings.device)), preprocessing, settings)
    if encoder.file != (file := _file_for(bundle, settings, encoder.device)):  # CUDA was expected but did not load
        encoder = _open_file(bundle, file, preprocessing, settings)
    return encoder


def _file_for(bundle: Bundle, settings: Settings, device: str) -> str:
    files = bundle.manifest.image_encoder.files
    precision = _FASTEST_PRECISION[device] if settings.precision == "auto" else "float"
    return files.get(precision, files["float"])


def _open_file(bundle: Bundle, file: str, preprocessing: Preprocessing, settings: Settings) -> OnnxEncoder:
    entry = bundle.manifest.image_encoder
    return OnnxEncoder(
        bundle.path / file,
        preprocessing,
        input_name=entry.input,
        patches_name=entry.outputs[0],
        embedding_name=entry.outputs[1],
        embedding_dim=bundle.manifest.embedding_dim,
        device=settings.device,
        threads=settings.thread_count,
        max_batch=settings.batch_limit("cuda"),  # only used on a GPU
        stay_on_device=settings.search_device == "graph",
    )


def expected_device(device: Device) -> str:
    """Return where a session should run. `auto` means CUDA if it is compiled in, though it may still fail to load."""
    if device == "auto":
        return "cuda" if _CUDA in onnxruntime.get_available_providers() else "cpu"
    return device


def open_session(path: Path, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """Open a session of ONNX Runtime. Raises as `OnnxEncoder` does."""
    cuda_error = ""
    providers: list[str | tuple[str, dict[str, str]]] = [_CPU]
    if expected_device(device) == "cuda":
        # The default, an exhaustive search for algorithms, takes seconds for each new batch size.
        providers.insert(0, (_CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}))
        if _CUDA not in onnxruntime.get_available_providers():
            raise UserError("device cuda: this onnxruntime has no CUDA; install the `gpu` extra, or use --device cpu")
        cuda_error = load_cuda_libraries()
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise BundleAltered(f"{path} cannot be loaded ({first_line(error)}); export the bundle again") from error
    # If a CUDA library does not load, ONNX Runtime silently uses the CPU.
    if len(providers) == 2 and _CUDA not in session.get_providers():
        why = f" ({cuda_error})" if cuda_error else ""
        if device == "cuda":
            raise UserError(f"device cuda: CUDA's libraries or driver do not load{why}; fix that or use --device cpu")
        log.warning("CUDA is compiled in but does not load%s: the encoder runs on the CPU", why)
    return session
