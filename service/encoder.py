"""The bundle's image encoder on ONNX Runtime.

Shapes: B batch, H/W pixels, D embedding width.
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
from service.settings import Device

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

log = logging.getLogger("wikiclip.encoder")


class OnnxEncoder:
    """Pixels to query embeddings. One thread is to own it.

    On a GPU a batch of `max_batch` is run once before this is ready: memory is taken then, for all that come. Raises
    `UserError` if CUDA is asked for and does not work, `BundleAltered` if the file is no such encoder.
    """

    def __init__(
        self,
        path: Path,
        preprocessing: Preprocessing,
        *,
        input_name: str,
        patches_name: str,
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
        names = {node.name for node in self._session.get_inputs()}, {node.name for node in self._session.get_outputs()}
        if input_name not in names[0] or not {patches_name, embedding_name} <= names[1]:
            raise BundleAltered(
                f"{path} has no {input_name!r} in or no {patches_name!r} and {embedding_name!r} out; export it again"
            )
        # The first pass allocates and is slow: it is not to be some user's.
        blank_BHW3 = np.zeros((max_batch, preprocessing.size_px, preprocessing.size_px, 3), np.uint8)
        if self.device == "cuda":
            self.encode(blank_BHW3)
        shape = self.encode(blank_BHW3[:1]).shape
        if shape != (1, embedding_dim):
            raise BundleAltered(
                f"{path} gives embeddings {shape}, the manifest says width {embedding_dim}; export again"
            )

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 `[B, H, W, 3]` to float32 `[B, D]`."""
        return self._run(self._embedding_name, pixels_BHW3)

    def patch_tokens(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 `[B, H, W, 3]` to float32 `[B, P, C]`. Any thread may ask, also while another encodes."""
        return self._run(self._patches_name, pixels_BHW3)

    def _run(self, output_name: str, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        pixels_B3HW = normalise(pixels_BHW3, self.preprocessing)
        (output,) = self._session.run([output_name], {self._input_name: pixels_B3HW})
        return np.asarray(output, np.float32)


def wanted_device(device: Device) -> str:
    """Where a session for this device is to run: `auto` takes CUDA where it is compiled in, which may yet not load."""
    if device == "auto":
        return "cuda" if _CUDA in onnxruntime.get_available_providers() else "cpu"
    return device


def open_session(path: Path, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime on the device. Raises as `OnnxEncoder` does."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads burn the cores that the decoders need while there is nothing to encode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    missing = ""
    providers: list[str | tuple[str, dict[str, str]]] = [_CPU]
    if wanted_device(device) == "cuda":
        # The default search for algorithms runs anew for each batch size, for seconds.
        providers.insert(0, (_CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}))
        if _CUDA not in onnxruntime.get_available_providers():
            raise UserError("device cuda: this onnxruntime has no CUDA; install the `gpu` extra, or use --device cpu")
        missing = load_cuda_libraries()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        # ONNX Runtime's exceptions share no base class; whatever it says, the file cannot be run here.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleAltered(f"{path} cannot be loaded ({reason}); export the bundle again") from error
    # What was asked for and what was got can differ: a CUDA library that does not load leaves the CPU, silently.
    if len(providers) == 2 and _CUDA not in session.get_providers():
        why = f" ({missing})" if missing else ""
        if device == "cuda":
            raise UserError(
                f"device cuda: CUDA was not got, its libraries or driver do not load{why}; fix that or use --device cpu"
            )
        log.warning("CUDA is compiled in but does not load%s: the encoder runs on the CPU", why)
    return session


@cache
def load_cuda_libraries() -> str:
    """Load CUDA and cuDNN, once in a process, from pip's `nvidia-*` wheels where they are installed: those lie where no
    linker looks, and ONNX Runtime goes by the linker. What could not be loaded, as it says it, empty if nothing."""
    said = io.StringIO()
    with redirect_stdout(said):  # stdout is for answers
        onnxruntime.preload_dlls()
    return said.getvalue().partition("\n")[0].strip()
