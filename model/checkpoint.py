"""A checkpoint: one folder with a trained adaptor and the identity of its two encoders.

checkpoint.json               sizes, encoders by spec and content hash, training settings, versions, SHA-256 of the rest
adaptor.safetensors
image_encoder.safetensors     only with a tiny encoder, whose weights are nowhere else
image_encoder/                only with an `onnx:` encoder: a copy of its files
"""

from __future__ import annotations

import json
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from core.errors import CheckpointError, UserError
from core.files import atomic_write, atomic_write_bytes, sha256_file
from model.adaptor import Adaptor, AdaptorConfig
from model.encoders import ImageEncoder, TextEncoder, open_image_encoder, open_text_encoder
from model.encoders.base import widths
from model.encoders.onnx import copy_onnx

FORMAT_VERSION = 1
_JSON = "checkpoint.json"
_ADAPTOR = "adaptor.safetensors"
_IMAGE_ENCODER = "image_encoder.safetensors"
_ONNX_FOLDER = "image_encoder"
_RESTORE = "train again, or restore the file"
_VERSIONS_OF = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint: frozen encoders, and the adaptor in evaluation mode, all on one device."""

    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    adaptor: Adaptor
    sha256: str  # of checkpoint.json, which has the hashes of the other files
    values: dict[str, Any]  # checkpoint.json

    @property
    def logit_scale(self) -> float:
        """1 / temperature of the trained softmax."""
        return float(self.values["logit_scale"])

    @property
    def device(self) -> torch.device:
        return next(self.adaptor.parameters()).device

    @property
    def centre(self) -> torch.Tensor | None:
        """What is subtracted from image embeddings [D], or None."""
        return self.adaptor.centre_D

    @torch.no_grad()
    def embed_queries(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the L2-normalised query embeddings `[B, D]` of images, `h` in the paper."""
        embeddings_BD = self.image_encoder.encode(pixels_BHW3).image_embedding_BD
        result_BD: npt.NDArray[np.float32] = self.adaptor.centred(embeddings_BD).cpu().numpy()
        return result_BD

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        image_encoder_spec: str | None = None,
        text_encoder_spec: str | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """Load a folder that `save_checkpoint` wrote.

        The specs replace those that the checkpoint records. Raises `CheckpointError` if a file is missing or altered,
        if shapes contradict each other, or if an encoder is not the one that the adaptor was trained with.
        """
        values = _read_json(path)
        adaptor = _load_adaptor(path, values)
        image, text = values["image_encoder"], values["text_encoder"]
        if image["spec"] == "tiny" and image_encoder_spec is None:
            image_encoder_spec = f"tiny:{_check_file(path, _IMAGE_ENCODER, values)}"
        elif "file" in image and image_encoder_spec is None:
            image_encoder_spec = f"onnx:{path / image['file']}"
        image_spec = image_encoder_spec or _recorded_spec(path, "image", image)
        image_encoder = open_image_encoder(image_spec, device=device, trust_remote_code=trust_remote_code)
        _check_same(path, "image", image, image_encoder.content_hash)
        text_spec = text_encoder_spec or _recorded_spec(path, "text", text)
        tokens, layer = text["max_tokens"], text["layer"]
        text_encoder = open_text_encoder(
            text_spec, device=device, max_tokens=tokens, layer=layer, trust_remote_code=trust_remote_code
        )
        _check_same(path, "text", text, text_encoder.content_hash)
        check_shapes(adaptor.config, image_encoder, text_encoder)
        return cls(
            image_encoder=image_encoder,
            text_encoder=text_encoder,
            adaptor=adaptor.to(device).eval().requires_grad_(False),
            sha256=sha256_file(path / _JSON),
            values=values,
        )


def save_checkpoint(
    path: Path,
    *,
    adaptor: Adaptor,
    logit_scale: float,
    image_encoder: ImageEncoder,
    text_encoder: TextEncoder,
    training: dict[str, Any],
    half: bool = True,
) -> None:
    """Write a checkpoint folder, keeping other files in it. `half` stores the adaptor's weights in float16.

    All files are written under temporary names, then moved into place, `checkpoint.json` last. Raises
    `CheckpointError` if `path` is a file.
    """
    check_shapes(adaptor.config, image_encoder, text_encoder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; name a folder for the checkpoint")
    path.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if half else torch.float32
    state = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in adaptor.state_dict().items()}
    image = {
        **encoder_identity(image_encoder),
        "preprocessing": image_encoder.preprocessing.to_dict(),
        "patches": image_encoder.patches,
        "patch_dim": image_encoder.patch_dim,
        "embedding_dim": image_encoder.embedding_dim,
    }
    source: Path | None = getattr(image_encoder, "onnx_path", None)
    if source is not None:
        copy = path / _ONNX_FOLDER / source.name
        copy_onnx(source, copy)
        atomic_write_bytes(copy.with_suffix(".json"), json.dumps(image["preprocessing"]).encode())
        image["file"] = copy.relative_to(path).as_posix()
    files = {}
    with ExitStack() as stack:
        json_file = stack.enter_context(atomic_write(path / _JSON))  # entered first, so moved into place last
        adaptor_file = stack.enter_context(atomic_write(path / _ADAPTOR))
        adaptor_file.write_bytes(save(state))  # `save_file` would make it readable by its owner only
        files[_ADAPTOR] = sha256_file(adaptor_file)
        if image["spec"] == "tiny":
            from model.encoders.tiny import BUILT_IN

            source = Path(image_encoder.spec.partition(":")[2] or BUILT_IN)
            tiny_file = stack.enter_context(atomic_write(path / _IMAGE_ENCODER))
            tiny_file.write_bytes(source.read_bytes())  # the source may be the file that it replaces
            files[_IMAGE_ENCODER] = sha256_file(tiny_file)
        values = {
            "format_version": FORMAT_VERSION,
            "adaptor": adaptor.config.to_dict(),
            "image_encoder": image,
            "text_encoder": {
                **encoder_identity(text_encoder),
                "dim": text_encoder.dim,
                "max_tokens": text_encoder.max_tokens,
                "layer": text_encoder.layer,
            },
            "logit_scale": logit_scale,
            "training": training,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
            "files": files,
        }
        json_file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_shapes(config: AdaptorConfig, image_encoder: ImageEncoder, text_encoder: TextEncoder) -> None:
    """Raise `CheckpointError` unless the adaptor's widths equal the encoders'."""
    for name, theirs in widths(image_encoder, text_encoder).items():
        ours = getattr(config, name)
        if ours != theirs:
            raise CheckpointError(f"the adaptor's {name} is {ours}, the encoder's {theirs}; use the matching encoder")


def _read_json(path: Path) -> dict[str, Any]:
    file = path / _JSON
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is not a checkpoint: {_JSON} is missing; check the path, or train one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {_RESTORE}") from error
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {found}, this program reads {FORMAT_VERSION}; train again")
    checked: dict[str, Any] = values
    names = ("adaptor", "image_encoder", "text_encoder", "logit_scale", "training", "versions", "files")
    missing = [name for name in names if name not in checked]
    for name, fields in {"image_encoder": (), "text_encoder": ("max_tokens", "layer")}.items():
        needed = ("spec", "local", "content_hash", *fields)
        missing += [f"{name}.{field}" for field in needed if field not in checked.get(name, {})]
    if missing:
        raise CheckpointError(f"{file}: `{missing[0]}` is missing; {_RESTORE}")
    return checked


def _check_file(path: Path, name: str, values: dict[str, Any]) -> Path:
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{path} is incomplete: {name} is missing; {_RESTORE}")
    if sha256_file(file) != values["files"].get(name):
        raise CheckpointError(f"{file} is altered: its SHA-256 is not the one in {_JSON}; {_RESTORE}")
    return file


def _load_adaptor(path: Path, values: dict[str, Any]) -> Adaptor:
    file = _check_file(path, _ADAPTOR, values)
    try:
        adaptor = Adaptor(AdaptorConfig.from_dict(values["adaptor"]))
        adaptor.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    except (UserError, SafetensorError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {error}; {_RESTORE}") from error
    except RuntimeError as error:  # torch's, with one line per wrong name or shape
        reason = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise CheckpointError(f"{file} does not have the shapes in {_JSON}: {reason}") from error
    return adaptor


def _recorded_spec(path: Path, kind: str, encoder: dict[str, Any]) -> str:
    spec: str = encoder["spec"]
    if encoder["local"]:
        raise CheckpointError(
            f"{path}: its {kind} encoder {spec} was a file on the machine that trained it; name its path with "
            f"--{kind}-encoder {spec.partition(':')[0]}:PATH"
        )
    return spec


def _check_same(path: Path, kind: str, encoder: dict[str, Any], content_hash: str) -> None:
    if content_hash != encoder["content_hash"]:
        raise CheckpointError(
            f"{path} was trained with another {kind} encoder (hash {encoder['content_hash'][:12]}, not "
            f"{content_hash[:12]}); name the right {encoder['spec']} with --{kind}-encoder, or train again"
        )


def encoder_identity(encoder: ImageEncoder | TextEncoder) -> dict[str, Any]:
    """Return what identifies an encoder, without the folders of this machine."""
    kind, _, name = encoder.spec.partition(":")
    local = kind != "tiny" and bool(name) and Path(name).exists()
    portable = f"{kind}:{Path(name).resolve().name}" if local else encoder.spec
    return {"spec": "tiny" if kind == "tiny" else portable, "local": local, "content_hash": encoder.content_hash}
