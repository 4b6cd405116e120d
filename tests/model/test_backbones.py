"""The paper's backbones and related ones: remote code, model families, and shapes at real size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
)

from core.errors import EncoderSpecError
from export.onnx import export_image_encoder
from imaging import normalise
from model.adaptor import Adaptor, AdaptorConfig
from model.encoders import open_image_encoder
from model.encoders.huggingface import ClipTower

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
PIXELS_BHW3 = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with remote code and without an image processor, like EVA-CLIP's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "small-eva"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "remote_code" / "modeling_small_eva.py", folder)
    classes = {
        "AutoConfig": "modeling_small_eva.SmallEvaConfig",
        "AutoModel": "modeling_small_eva.EvaCLIPModel",
    }
    values = {
        "model_type": "small_eva",
        "architectures": ["EvaCLIPModel"],
        "auto_map": classes,
        "projection_dim": 20,
        "vision_config": {"image_size": 32, "patch_size": 8, "hidden_size": 24},
    }
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModel.from_config(config, trust_remote_code=True).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_remote_code_runs_with_the_flag(remote: Path, tmp_path: Path) -> None:
    encoder = open_image_encoder(f"hf:{remote}", trust_remote_code=True)
    assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (16, 20, 20)
    clip = CLIPImageProcessorPil()
    assert encoder.preprocessing.mean == pytest.approx(tuple(clip.image_mean))  # as EVA-CLIP's authors use
    assert (encoder.preprocessing.size_px, encoder.preprocessing.crop) == (32, "center")
    features = encoder.encode(PIXELS_BHW3)
    module: Any = encoder.module  # type: ignore[attr-defined]
    with torch.no_grad():
        hidden = module.vision_model(torch.from_numpy(normalise(PIXELS_BHW3, encoder.preprocessing))).last_hidden_state
        projected = module.projection(module.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(projected[:, 0], dim=1))
    torch.testing.assert_close(features.patch_tokens_BPC, projected[:, 1:])
    assert export_image_encoder(encoder, tmp_path).min_cosine > 0.9999


@pytest.mark.parametrize("model_type", ["small_eva", "clip"])
def test_remote_code_never_runs_without_the_flag(remote: Path, model_type: str) -> None:
    """Neither for a model type unknown to transformers, nor for one that it maps to another network."""
    config = remote / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": model_type}))
    with pytest.raises(EncoderSpecError, match="--trust-remote-code") as caught:
        open_image_encoder(f"hf:{remote}")
    assert "\n" not in str(caught.value)


def test_metaclip_2_is_a_clip_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MetaClip2Config(vision_config={**VISION, "image_size": 32}, text_config=TEXT, projection_dim=20)
    model = MetaClip2Model(config).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = open_image_encoder(f"hf:{tmp_path}")
    with torch.no_grad():
        pixel_values = torch.from_numpy(normalise(PIXELS_BHW3, encoder.preprocessing))
        expected_BD = model.get_image_features(pixel_values).pooler_output
    features = encoder.encode(PIXELS_BHW3)
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(expected_BD, dim=1))
    assert features.patch_tokens_BPC.shape == (3, 16, 20)


def test_naflex_equals_the_original_on_square_images(tmp_path: Path) -> None:
    """Positions learned on a grid of 8 x 8 are resized to the 4 x 4 patches that the processor allows."""
    torch.manual_seed(0)
    model = Siglip2Model(Siglip2Config(vision_config={**VISION, "num_patches": 64}, text_config=TEXT)).eval()
    model.save_pretrained(tmp_path)
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    processor.save_pretrained(tmp_path)
    encoder = open_image_encoder(f"hf:{tmp_path}")
    assert (encoder.patches, encoder.preprocessing.size_px, encoder.preprocessing.resize) == (16, 32, "squash")
    features = encoder.encode(PIXELS_BHW3)
    with torch.no_grad():
        outputs = model.vision_model(**processor(images=list(PIXELS_BHW3), return_tensors="pt"))
        alone_BD = model.vision_model.head(outputs.last_hidden_state[:, 5:6])
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(outputs.pooler_output, dim=1))
    torch.testing.assert_close(features.patch_tokens_BPC[:, 5], alone_BD)
    assert export_image_encoder(encoder, tmp_path).min_cosine > 0.9999


def test_the_papers_backbones_at_real_size() -> None:
    """Check the sizes of EVA-CLIP-8B and LLaMA 3.2 1B and 3B on the meta device, which allocates no weights."""
    with torch.device("meta"):
        eva = CLIPVisionConfig(
            hidden_size=4096,
            intermediate_size=20480,
            num_hidden_layers=32,
            num_attention_heads=32,
            image_size=224,
            patch_size=14,
            projection_dim=1280,
        )
        tower = CLIPVisionModelWithProjection(eva)
        patch_tokens_BPC, embedding_BD = ClipTower(tower.vision_model, tower.visual_projection)(
            torch.empty(2, 3, 224, 224)
        )
        assert patch_tokens_BPC.shape == (2, 256, 1280)
        assert embedding_BD.shape == (2, 1280)
        assert sum(p.numel() for p in tower.parameters()) == pytest.approx(7.5e9, rel=0.03)
        for width, layers, heads, parameters in ((2048, 16, 32, 1.24e9), (3072, 28, 24, 3.21e9)):
            llama = LlamaConfig(
                vocab_size=128256,
                hidden_size=width,
                intermediate_size=8192,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=8,
                max_position_embeddings=131072,
                attn_implementation="eager",  # the others need the mask's values
            )
            model = LlamaModel(llama)
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
            ids = torch.ones(2, 256, dtype=torch.long)
            states = model(input_ids=ids, attention_mask=ids, use_cache=False).last_hidden_state
            assert states.shape == (2, 256, width)
            config = AdaptorConfig(patch_dim=1280, text_dim=width, embedding_dim=1280, width=1280)
            there_BT = torch.ones(2, 256, dtype=torch.bool)
            arguments = (patch_tokens_BPC, there_BT[:, 0], states, there_BT, torch.randn(2, 1280))
            assert Adaptor(config)(*arguments).shape == (2, 1280)
