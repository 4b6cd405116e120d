"""The bundle's image encoder on ONNX Runtime.

Shapes: B batch, H/W pixels, P patches, C patch channels, D embedding width.
"""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import BundleAltered, UserError
from core.runtime import onnxruntime
from imaging import Preprocessing, normalise
from index.bundle import Bundle
from service.settings import Device, Settings

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
    ) -> None:
        self.file = path.name
        self.preprocessing = preprocessing
        self._input_name = input_name
        self._patches_name = patches_name
        self._embedding_name = embedding_name
        self._session = open_session(path, device, threads)
        self.device = "cuda" if _CUDA in self._session.get_providers() else "cpu"
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
        shape = self.encode(blank_BHW3[:1]).shape
        if shape != (1, embedding_dim):
            raise BundleAltered(
                f"{path} outputs embeddings of shape {shape}, but the manifest says width {embedding_dim}; export again"
            )

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the L2-normalised embeddings [B, D]. An `onnx:` encoder in a bundle need not normalise them."""
        embeddings_BD = self._run(self._embedding_name, pixels_BHW3)
        lengths_B1 = np.linalg.norm(embeddings_BD, axis=1, keepdims=True)
        # Not those that are normalised up to rounding: their last digits, and so the answers, would change.
        lengths_B1[(np.abs(lengths_B1 - 1) < _ROUNDING) | (lengths_B1 == 0)] = 1
        embeddings_BD /= lengths_B1
        return embeddings_BD

    def patch_tokens(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the patch tokens [B, P, C]. Thread-safe."""
        assert self._patches_name is not None
        return self._run(self._patches_name, pixels_BHW3)

    def _run(self, output_name: str, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        pixels_B3HW = normalise(pixels_BHW3, self.preprocessing)
        (output,) = self._session.run([output_name], {self._input_name: pixels_B3HW})
        return np.asarray(output, np.float32)


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
    )


def expected_device(device: Device) -> str:
    """Return where a session should run. `auto` means CUDA if it is compiled in, though it may still fail to load."""
    if device == "auto":
        return "cuda" if _CUDA in onnxruntime.get_available_providers() else "cpu"
    return device


def open_session(path: Path, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """Open a session of ONNX Runtime. Raises as `OnnxEncoder` does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without this, idle threads spin and take cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cuda_error = ""
    providers: list[str | tuple[str, dict[str, str]]] = [_CPU]
    if expected_device(device) == "cuda":
        # The default, an exhaustive search for algorithms, takes seconds for each new batch size.
        providers.insert(0, (_CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}))
        if _CUDA not in onnxruntime.get_available_providers():
            raise UserError("device cuda: this onnxruntime has no CUDA; install the `gpu` extra, or use --device cpu")
        cuda_error = load_cuda_libraries()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        # ONNX Runtime's exceptions have no common base class.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleAltered(f"{path} cannot be loaded ({reason}); export the bundle again") from error
    # If a CUDA library does not load, ONNX Runtime silently uses the CPU.
    if len(providers) == 2 and _CUDA not in session.get_providers():
        why = f" ({cuda_error})" if cuda_error else ""
        if device == "cuda":
            raise UserError(f"device cuda: CUDA's libraries or driver do not load{why}; fix that or use --device cpu")
        log.warning("CUDA is compiled in but does not load%s: the encoder runs on the CPU", why)
    return session


@cache
def load_cuda_libraries() -> str:
    """Load CUDA and cuDNN from pip's `nvidia-*` wheels, which the linker does not search. Return the error, if any."""
    output = io.StringIO()
    with redirect_stdout(output):  # stdout is for answers
        onnxruntime.preload_dlls()
    return output.getvalue().partition("\n")[0].strip()
