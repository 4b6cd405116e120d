"""`onnx:PATH`: an image encoder in an ONNX file, with its preprocessing in a JSON file of the same name.

docs/encoders.md has the contract. `check_onnx` says how a file breaks it.

Shapes: B batch, P patches, C patch channels, D embedding, H = W = size_px.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from core.arrays import Pixels
from core.errors import EncoderSpecError, first_line
from core.files import atomic_write, sha256_file
from imaging.preprocess import Preprocessing, normalise
from model.encoders.base import ImageFeatures

_INPUT = "pixel_values"
_PATCHES, _EMBEDDING = "patch_tokens", "image_embedding"
_CPU = torch.device("cpu")
_RANKS = ((_EMBEDDING, 2, "[B, D]"), (_PATCHES, 3, "[B, P, C]"))
_FLOATS = ("tensor(float)", "tensor(float16)")


@dataclass(kw_only=True)
class OnnxCheck:
    """The result of `check_onnx`. Without problems, `session` and `preprocessing` are set.

    `data` are the files of `external_data`.
    """

    problems: list[str] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    session: Any = None
    preprocessing: Preprocessing | None = None
    patches: int = 0
    patch_dim: int = 0
    embedding_dim: int = 0


class OnnxImageEncoder:
    """A frozen image tower (`ImageEncoder`) run by ONNX Runtime. Raises `EncoderSpecError` if `check_onnx` objects."""

    def __init__(self, path: Path, *, spec: str, device: torch.device) -> None:
        check = check_onnx(path, device)
        if check.problems:
            more = len(check.problems) - 1
            also = f" ({more} more: see `wikiclip inspect {path}`)" if more else ""
            raise EncoderSpecError(f"{spec}: {check.problems[0]}{also}")
        assert check.preprocessing is not None
        self.spec = spec
        self.onnx_path = path
        self.preprocessing = check.preprocessing
        digest = hashlib.sha256(json.dumps(self.preprocessing.to_dict(), sort_keys=True).encode())
        for file in (path, *check.data):
            digest.update(f"\n{sha256_file(file)}".encode())
        self.content_hash = digest.hexdigest()
        self.patches, self.patch_dim, self.embedding_dim = check.patches, check.patch_dim, check.embedding_dim
        self._session = check.session
        self._device = device

    def encode(self, pixels_BHW3: Pixels) -> ImageFeatures:
        """Return patch tokens `[B, P, C]` and L2-normalised embeddings `[B, D]`, float32, on the encoder's device.

        P and C are 0 if the file has no patch tokens.
        """
        names = [_EMBEDDING, _PATCHES] if self.patches else [_EMBEDDING]
        outputs = self._session.run(names, {_INPUT: normalise(pixels_BHW3, self.preprocessing)})
        image_embedding, *tokens = (torch.from_numpy(output).to(self._device).float() for output in outputs)
        return ImageFeatures(
            patch_tokens_BPC=tokens[0] if tokens else image_embedding.new_empty(len(pixels_BHW3), 0, 0),
            image_embedding_BD=F.normalize(image_embedding, dim=1),
        )


def check_onnx(path: Path, device: torch.device = _CPU) -> OnnxCheck:
    """Check a file against the contract: names, types, shapes, and a trial on two images.

    Raises `EncoderSpecError` if ONNX Runtime lacks the device.
    """
    check = OnnxCheck()
    if not path.is_file():
        check.problems.append(f"{path} does not exist; check the path")
        return check
    try:
        check.preprocessing = _read_preprocessing(path.with_suffix(".json"))
    except EncoderSpecError as error:
        check.problems.append(str(error))
    try:
        check.data = external_data(path)
        check.session = _open_session(path, device)
    except EncoderSpecError as error:
        check.problems.append(str(error))
        return check
    check.problems += _declared_problems(check)
    if not check.problems:
        check.problems += _trial_problems(check)
    return check


def _declared_problems(check: OnnxCheck) -> Iterator[str]:
    """Yield what is wrong with the declared inputs and outputs."""
    inputs = {node.name: node for node in check.session.get_inputs()}
    outputs = {node.name: node for node in check.session.get_outputs()}
    if set(inputs) != {_INPUT}:
        yield f"its inputs are {', '.join(inputs)}; export it with one input, named {_INPUT}"
    else:
        node = inputs[_INPUT]
        size = check.preprocessing.size_px if check.preprocessing else None
        if node.type != "tensor(float)":
            yield f"{_INPUT} is {node.type}; it must be float32"
        if len(node.shape) != 4:
            yield f"{_INPUT} has {len(node.shape)} dimensions; it must be [B, 3, H, W]"
        else:
            batch, channels, *sides = node.shape
            if isinstance(batch, int):
                yield f"its batch size is fixed at {batch}; export it with a dynamic first dimension"
            if isinstance(channels, int) and channels != 3:
                yield f"{_INPUT} has {channels} channels; it must be [B, 3, H, W], red, green and blue"
            fixed = [side for side in sides if isinstance(side, int)]
            if size is not None and any(side != size for side in fixed):
                shown = "x".join(map(str, fixed))
                yield f"it takes images of {shown} px, but its preprocessing says {size} px; correct one of them"
    if _EMBEDDING not in outputs:
        yield f"its outputs are {', '.join(outputs)}; name the embedding {_EMBEDDING}"
    for name, rank, shape in _RANKS:
        node = outputs.get(name)
        if node is not None and node.type not in _FLOATS:
            yield f"{name} is {node.type}; it must be float32"
        if node is not None and node.shape and len(node.shape) != rank:
            yield f"{name} has {len(node.shape)} dimensions; it must be {shape}"


def _trial_problems(check: OnnxCheck) -> Iterator[str]:
    """Run two images, set the sizes, and yield what is wrong with the outputs."""
    assert check.preprocessing is not None
    size = check.preprocessing.size_px
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    names = [node.name for node in check.session.get_outputs() if node.name in (_PATCHES, _EMBEDDING)]
    try:
        found = check.session.run(names, {_INPUT: normalise(pixels_BHW3, check.preprocessing)})
    except Exception as error:  # ONNX Runtime's errors have no public base class
        yield f"it fails on two images of {size} px, the size in its preprocessing: {first_line(error)}"
        return
    outputs = dict(zip(names, found, strict=True))
    for name, rank, shape in _RANKS:
        output = outputs.get(name)
        if output is None:
            continue
        if output.ndim != rank or len(output) != 2 or 0 in output.shape:
            yield f"{name} of two images has the shape {list(output.shape)}; it must be {shape} with B = 2"
        elif not np.isfinite(output).all():
            yield f"{name} of a random image is not finite; check the weights and the preprocessing"
        elif name == _EMBEDDING:
            check.embedding_dim = output.shape[1]
            if not output.any(axis=1).all():
                yield f"{name} of a random image is zero; check the weights and the preprocessing"
        else:
            check.patches, check.patch_dim = output.shape[1:]


def _read_preprocessing(path: Path) -> Preprocessing:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EncoderSpecError(f"its preprocessing {path} is missing; write that file") from None
    except (OSError, ValueError) as error:
        raise EncoderSpecError(f"its preprocessing {path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise EncoderSpecError(f"its preprocessing {path} must be a JSON object")
    try:
        return Preprocessing.from_dict(values)
    except EncoderSpecError as error:
        raise EncoderSpecError(f"{path}: {error}") from error


def external_data(path: Path) -> list[Path]:
    """Return the sorted files with an ONNX file's large tensors. Raises `EncoderSpecError` if one is missing."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError; protobuf is not a dependency of ours
        raise EncoderSpecError(f"{path} is not an ONNX file: {first_line(error)}") from error
    names = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    files = [path.parent / name for name in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise EncoderSpecError(
            f"the external data of {path} is missing: {', '.join(missing)}; put it in the same folder"
        )
    return files


def copy_onnx(source: Path, target: Path) -> None:
    """Copy an ONNX file with its external data. Raises `EncoderSpecError` if that is outside its folder."""
    copies: dict[Path, Path] = {}
    for data in external_data(source):
        name = PurePath(data).relative_to(source.parent)
        if ".." in name.parts:
            raise EncoderSpecError(
                f"onnx:{source} has external data outside its folder ({name}); save it in the same folder"
            )
        copies[data] = target.parent / name
    for original, copy in {**copies, source: target}.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(copy) as temporary:
            shutil.copyfile(original, temporary)


def _open_session(path: Path, device: torch.device) -> Any:
    from core.runtime import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors have no public base class
        raise EncoderSpecError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from error
    # Without the provider, or if it fails to start, ONNX Runtime only warns and runs on the CPU.
    if session.get_providers()[0] != provider:
        raise EncoderSpecError(
            f"{path}: {provider} did not start; install onnxruntime-gpu and the CUDA libraries, or use --device cpu"
        )
    return session
