"""`hf:ID_OR_PATH`: image towers and text encoders of transformers, from the Hub or a folder. `hf:ID@REVISION` reads a
branch, tag or commit of the Hub.

Patch tokens must share the space of the pooled embedding, since the two are compared. CLIP's pass the tower's final
norm and projection one by one, as its class token does. SigLIP pools by attention: each token passes the pooling head
alone, where attention reduces to the value projection. SigLIP 2's NaFlex runs on one square grid of as many patches as
its processor allows. Other vision models pool by their class token, or by the mean of a feature map: each token passes
what follows alone.

Each tower maps `pixel_values [B, 3, H, W]` to patch tokens `[B, P, D]` and the normalised image embedding `[B, D]`.

Shapes: B batch, P patches, C hidden width, D embedding width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import EncoderSpecError, first_line
from imaging.preprocess import Preprocessing
from model.encoders.base import TorchImageEncoder
from model.encoders.text import TokenStateEncoder

_CONFIG = "config.json"  # of a model
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as the configs store them
_NEEDS_CODE = " needs code from its repository; read it, then allow it with --trust-remote-code"


class ClipTower(nn.Module):
    """CLIP, MetaCLIP, EVA-CLIP: class token and patch tokens pass the same norm and projection."""

    def __init__(self, vision_model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision_model: Any = vision_model
        self.projection = projection

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = next(self.projection.parameters()).dtype
        outputs = self.vision_model(pixel_values=pixel_values.to(dtype))
        normed_BPC = self.vision_model.post_layernorm(outputs.last_hidden_state[:, 1:])
        return self.projection(normed_BPC), F.normalize(self.projection(outputs.pooler_output), dim=1)


class SiglipTower(nn.Module):
    """SigLIP and SigLIP 2 at a fixed resolution: no class token, attention pooling."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model: Any = vision_model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.vision_model.post_layernorm.weight.dtype
        outputs = self.vision_model(pixel_values=pixel_values.to(dtype))
        patch_tokens_BPD = _pooled_alone(self.vision_model.head, outputs.last_hidden_state)
        return patch_tokens_BPD, F.normalize(outputs.pooler_output, dim=1)


class NaflexTower(nn.Module):
    """SigLIP 2's NaFlex, which takes flattened patches, on one square grid. Its positions are resized to it once."""

    def __init__(self, vision_model: nn.Module, size_px: int) -> None:
        super().__init__()
        self.vision_model: Any = vision_model
        embeddings: Any = self.vision_model.embeddings
        self.patch_px: int = embeddings.patch_size
        self.grid = size_px // self.patch_px
        side = embeddings.position_embedding_size
        learned = embeddings.position_embedding.weight.detach().reshape(side, side, -1)
        shape_B2 = torch.tensor([[self.grid, self.grid]])
        position_BPC = embeddings.resize_positional_embeddings(learned, shape_B2, self.grid**2)
        self.register_buffer("position_BPC", position_BPC)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model, grid, patch_px = self.vision_model, self.grid, self.patch_px
        cut = pixel_values.reshape(-1, 3, grid, patch_px, grid, patch_px).permute(0, 2, 4, 3, 5, 1)
        patches_BPC = cut.reshape(-1, grid**2, patch_px**2 * 3).to(model.post_layernorm.weight.dtype)
        embedded_BPC = model.embeddings.patch_embedding(patches_BPC) + self.position_BPC
        encoded = model.encoder(inputs_embeds=embedded_BPC, attention_mask=None).last_hidden_state
        hidden_BPC = model.post_layernorm(encoded)
        return _pooled_alone(model.head, hidden_BPC), F.normalize(model.head(hidden_BPC), dim=1)


class PooledTower(nn.Module):
    """DINOv2, ViT, ConvNeXt, ResNet and other vision models with a pooled output."""

    def __init__(self, model: nn.Module, size_px: int) -> None:
        super().__init__()
        self.model: Any = model
        patch_px = getattr(self.model.config, "patch_size", None)
        self.grid = size_px // patch_px if isinstance(patch_px, int) else 0

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(pixel_values=pixel_values.to(next(self.model.parameters()).dtype))
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is None:
            raise ValueError("it has no pooled output; export it to ONNX with one and use onnx:PATH")
        return self._patch_tokens(outputs.last_hidden_state), F.normalize(pooled.flatten(1), dim=1)

    def _patch_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.ndim == 4:  # a feature map [B, C, H, W]
            tokens_BPC = hidden.flatten(2).transpose(1, 2)
            norm: nn.Module = getattr(self.model, "layernorm", nn.Identity())  # ConvNeXt's, after the mean
            normed_BPC: torch.Tensor = norm(tokens_BPC)
            return normed_BPC
        extra = max(hidden.shape[1] - self.grid**2, 0) if self.grid else 0  # class token and registers come first
        tokens_BPC = hidden[:, extra:]
        pooler: Any = getattr(self.model, "pooler", None)
        if not isinstance(getattr(pooler, "dense", None), nn.Linear):
            return tokens_BPC
        patches, width = tokens_BPC.shape[1:]
        alone: torch.Tensor = pooler(tokens_BPC.reshape(-1, 1, width))
        return alone.reshape(-1, patches, alone.shape[1])


def _pooled_alone(head: Any, hidden_BPC: torch.Tensor) -> torch.Tensor:
    """Pass each token through SigLIP's pooling head alone: `[B, P, D]`."""
    width = hidden_BPC.shape[2]
    attention: nn.MultiheadAttention = head.attention
    assert attention.in_proj_weight is not None
    value_bias = attention.in_proj_bias[2 * width :] if attention.in_proj_bias is not None else None
    values = F.linear(hidden_BPC, attention.in_proj_weight[2 * width :], value_bias)
    alone_BPD: torch.Tensor = attention.out_proj(values)
    result_BPD: torch.Tensor = alone_BPD + head.mlp(head.layernorm(alone_BPD))
    return result_BPD


def load_huggingface_image(name: str, *, device: torch.device, trust_remote_code: bool = False) -> TorchImageEncoder:
    """Load the image tower of a CLIP-family model, or a vision model with a pooled output.

    Raises `EncoderSpecError` if it or its preprocessing is missing.
    """
    spec = f"hf:{name}"
    source = _source(name)
    model = _load_model(spec, source, trust_remote_code)
    tower, preprocessing = _tower(spec, source, model), _load_preprocessing(spec, source)
    return TorchImageEncoder(tower, preprocessing, saved_config=_read_json(source, _CONFIG), spec=spec, device=device)


def load_huggingface_text(
    name: str, *, device: torch.device, max_tokens: int = 256, layer: int | None = None, trust_remote_code: bool = False
) -> TokenStateEncoder:
    """Load a text encoder, or a causal language model without its head. Raises `EncoderSpecError`."""
    from transformers import AutoTokenizer

    spec = f"hf:{name}"
    source = _source(name)
    model = _load_model(spec, source, trust_remote_code, auto=True)
    with _loading(spec, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=trust_remote_code
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise EncoderSpecError(f"{spec} has no fast tokenizer; save one as tokenizer.json in its folder")
    config = _read_json(source, _CONFIG)
    return TokenStateEncoder(
        model, backend, saved_config=config, spec=spec, device=device, max_tokens=max_tokens, layer=layer
    )


class _Source(NamedTuple):
    name: str  # an id of the Hub, or a folder
    revision: str  # transformers ignores it for a folder


def _source(name: str) -> _Source:
    """Split `ID@REVISION`. Raises `EncoderSpecError` for a revision of a folder."""
    before, _, revision = name.rpartition("@")
    if not before or Path(name).exists():  # the name of a folder may have an @
        return _Source(name, "main")
    if Path(before).exists():
        raise EncoderSpecError(f"hf:{name}: {before} is a folder and has no revisions; leave out @{revision}")
    return _Source(before, revision)


def _load_model(spec: str, source: _Source, trust_remote_code: bool, *, auto: bool = False) -> nn.Module:
    """Load a model in its stored precision: the class in its config or, with `auto`, the network without its head."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # missing weights are reported below
    with _loading(spec, "config"):
        config: Any = transformers.AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=trust_remote_code
        )
    architecture = (config.architectures or [""])[0]
    has_code = bool(getattr(config, "auto_map", None))
    if has_code and not trust_remote_code and not hasattr(transformers, architecture):
        raise EncoderSpecError(spec + _NEEDS_CODE)
    remote = trust_remote_code and has_code
    kind = transformers.AutoModel if auto or remote else getattr(transformers, architecture, transformers.AutoModel)
    options = {"revision": source.revision, **({"trust_remote_code": True} if remote else {})}
    with _loading(spec, "weights"):
        model, info = kind.from_pretrained(source.name, dtype="auto", output_loading_info=True, **options)
    missing = set(info["missing_keys"])
    if missing and auto and all(key.startswith("pooler.") for key in missing):
        # Checkpoints with a language-model head have no pooler. A random one would change the content hash each time.
        model.pooler = None
    elif missing:
        raise EncoderSpecError(
            f"{spec} lacks {len(missing)} weights of {type(model).__name__}, such as {min(missing)}; save all of them"
        )
    return model  # type: ignore[no-any-return]


@contextmanager
def _loading(spec: str, what: str) -> Iterator[None]:
    """Raise `EncoderSpecError` if transformers cannot load a part of a model."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            raise EncoderSpecError(spec + _NEEDS_CODE) from error
        reason = first_line(error)
        raise EncoderSpecError(f"{spec}: cannot load its {what}; check the name or the folder: {reason}") from error


def _tower(spec: str, source: _Source, model: nn.Module) -> nn.Module:
    """Return the image tower of a loaded model, without its text tower or classifier."""
    vision_model = getattr(model, "vision_model", model)
    projection = getattr(model, "visual_projection", None)
    if isinstance(projection, nn.Module) and hasattr(vision_model, "post_layernorm"):
        return ClipTower(vision_model, projection)
    head = getattr(vision_model, "head", None)
    if hasattr(vision_model, "post_layernorm") and hasattr(head, "probe"):
        patch_embedding = getattr(getattr(vision_model, "embeddings", None), "patch_embedding", None)
        if isinstance(patch_embedding, nn.Conv2d):
            return SiglipTower(vision_model)
        return NaflexTower(vision_model, _load_preprocessing(spec, source).size_px)
    base: Any = getattr(model, "base_model", model)  # without a classifier
    if getattr(base, "main_input_name", None) == "pixel_values" and not hasattr(vision_model, "post_layernorm"):
        return PooledTower(base, _load_preprocessing(spec, source).size_px)
    raise EncoderSpecError(
        f"{spec} ({type(model).__name__}) is neither an image tower of the CLIP or SigLIP family with its projection, "
        "nor a vision model with a pooled output; name one that is, or export yours to ONNX and use onnx:PATH"
    )


def _load_preprocessing(spec: str, source: _Source) -> Preprocessing:
    """Return the preprocessing of the model's image processor. Raises `EncoderSpecError`."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

    config = _read_json(source, _CONFIG)
    values = _read_json(source, IMAGE_PROCESSOR_NAME) or _read_json(source, PROCESSOR_NAME).get("image_processor")
    if not values and any("EvaCLIP" in architecture for architecture in config.get("architectures", [])):
        # EVA-CLIP's repositories use CLIP's image processor without including it.
        size_px = config["vision_config"]["image_size"]
        values = {"size": size_px, "crop_size": size_px, "do_center_crop": True, "resample": 3}
        values |= {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    if not values:
        raise EncoderSpecError(f"{spec} has no {IMAGE_PROCESSOR_NAME}; save the model's image processor in its folder")
    return preprocessing_from_processor(spec, values)


def _read_json(source: _Source, file: str) -> dict[str, Any]:
    """Return a JSON file of a model, empty if it has none."""
    from transformers.utils import cached_file

    path = cached_file(
        source.name,
        file,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    try:
        values: dict[str, Any] = json.loads(Path(path).read_bytes()) if path else {}
    except ValueError as error:
        raise EncoderSpecError(f"hf:{source.name}: {file} is not JSON: {error}") from error
    return values


def preprocessing_from_processor(spec: str, values: dict[str, Any]) -> Preprocessing:
    """Convert a saved image processor to `Preprocessing`. Raises `EncoderSpecError` if no `Preprocessing` equals it."""
    size = values.get("size") or {}
    if "max_num_patches" in values:  # NaFlex: its square grid
        side = math.isqrt(values["max_num_patches"]) * values["patch_size"]
        size = {"height": side, "width": side}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    crop = values.get("crop_size") or {}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    square = size.get("height") if size.get("height") == size.get("width") else None
    resize_px = size.get("shortest_edge") or square
    cropped = bool(values.get("do_center_crop"))
    if "crop_pct" in values and resize_px is not None:  # ConvNeXt: crops the centre below 384 px, else squashes
        crop, cropped = {"height": resize_px, "width": resize_px}, resize_px < 384
        size = {"shortest_edge": int(resize_px / values["crop_pct"])} if cropped else {"height": resize_px}
        resize_px = size.get("shortest_edge", resize_px)
    size_px = crop.get("height") if cropped and "shortest_edge" in size else resize_px
    requirements = {
        "a square `size` or a shortest edge": resize_px is not None,
        "a square `crop_size`": not cropped or crop.get("height") == crop.get("width") == size_px is not None,
        "`crop_size` up to `size`": not cropped or (size_px or 0) <= (resize_px or 0),
        "a centre crop after resizing by the shortest edge": cropped or "shortest_edge" not in size,
        "resample 2 (bilinear) or 3 (bicubic)": values.get("resample") in _INTERPOLATIONS,
        "do_resize": values.get("do_resize", True),
        "do_normalize": values.get("do_normalize", True),
        "rescale_factor 1/255": abs(values.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6,
        "image_mean and image_std": bool(values.get("image_mean")) and bool(values.get("image_std")),
    }
    missing = [what for what, met in requirements.items() if not met]
    if missing:
        raise EncoderSpecError(
            f"{spec}: its image processor cannot be reproduced exactly; it needs {', '.join(missing)}"
        )
    return Preprocessing.from_dict(
        {
            "size_px": size_px,
            "resize": "shortest" if "shortest_edge" in size else "squash",
            "crop": "center" if cropped else "none",
            "interpolation": _INTERPOLATIONS[values["resample"]],
            "mean": values["image_mean"],
            "std": values["image_std"],
            **({} if size_px == resize_px else {"resize_px": resize_px}),
        }
    )
