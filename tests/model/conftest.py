"""Small real encoders saved as files, and a small catalog of drawn images, for the model's tests."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from imaging import Preprocessing
from model.encoders.tiny import TinyConfig, TinyEncoder, save_tiny

WORDS = ["a", "the", "cat", "bird", "flag", "star", "red", "green", "blue", "yellow", "big", "round", "square", "of"]


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, [CLS] first and [SEP] last."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def text_spec(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> str:
    """A random BERT, 16 wide, of at most 32 tokens."""
    folder = tmp_path_factory.mktemp("encoders") / "small-bert"
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="session")
def tiny_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random tiny encoder: 32 px, 4 patches, 24 wide."""
    path = tmp_path_factory.mktemp("encoders") / "small-tiny.safetensors"
    torch.manual_seed(2)
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=24, size_px=32)
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(
        size_px=32, resize="squash", crop="none", interpolation="bilinear", mean=half, std=half
    )
    save_tiny(TinyEncoder(config).eval(), preprocessing, path)
    return f"tiny:{path}"


def write_onnx(
    folder: Path,
    *,
    offset: float = 0.0,
    outputs: tuple[str, str] = ("patch_tokens", "image_embedding"),
    pooled_rank: int = 2,
    batch: str | int = "batch",
    patch_tokens: bool = True,
) -> Path:
    """An encoder of one convolution: 4 patches of 24 channels for 16 px images, their mean as embedding."""
    weights = np.random.default_rng(3).normal(0, 0.1, (24, 3, 8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["pixel_values", "weights", "offset"], ["grid"], strides=[8, 8]),
        helper.make_node("Reshape", ["grid", "flat"], ["flattened"]),
        helper.make_node("Transpose", ["flattened"], [outputs[0]], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", [outputs[0], "patches_axis"], [outputs[1]], keepdims=int(pooled_rank == 3)),
    ]
    pooled_shape = [batch, 24] if pooled_rank == 2 else [batch, 1, 24]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [
            helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, [batch, 4, 24]),
            helper.make_tensor_value_info(outputs[1], TensorProto.FLOAT, pooled_shape),
        ][0 if patch_tokens else 1 :],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.full(24, offset, np.float32), "offset"),
            numpy_helper.from_array(np.array([0, 24, 4]), "flat"),
            numpy_helper.from_array(np.array([1]), "patches_axis"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = folder / "small.onnx"
    onnx.save(model, path)
    preprocessing = {"size_px": 16, "resize": "shortest", "crop": "center", "interpolation": "bicubic"}
    values = {**preprocessing, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    path.with_suffix(".json").write_text(json.dumps(values))
    return path


@pytest.fixture(scope="session")
def save_onnx() -> Callable[..., Path]:
    return write_onnx


@pytest.fixture(scope="session")
def onnx_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"onnx:{write_onnx(tmp_path_factory.mktemp('onnx'))}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    folder: Path
    catalog: Path
    pairs: Path
    validation: Path


def draw(path: Path, hue: float, shape: int, seed: int) -> None:
    """A coloured shape at a place and on a background that the seed chooses."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(180, 255, (48, 48, 3), dtype=np.uint8))
    colour = tuple(int(255 * value) for value in colorsys.hsv_to_rgb(hue, 1, 0.8))
    x, y = (int(value) for value in rng.integers(4, 16, 2))
    box = (x, y, x + 26, y + 26)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == 0 else pen.rectangle)(box, fill=colour)
    image.save(path)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve entities, six colours in two shapes, 8 of them seen in training; one has no image, one no text."""
    folder = tmp_path_factory.mktemp("dataset")
    entities: list[dict[str, object]] = []
    pairs: list[dict[str, object]] = []
    validation: list[dict[str, object]] = []
    for index in range(12):
        hue, shape = (index // 2) / 6, index % 2
        names = [f"e{index}-{number}.png" for number in range(4)]
        for number, name in enumerate(names):
            draw(folder / name, hue, shape, seed=100 * index + number)
        colour = ["red", "yellow", "green", "blue", "star", "bird"][index // 2]
        entities.append(
            {
                "entity_id": f"Q{index}",
                "title": f"Entity {index}",
                "text": "" if index == 3 else f"a big {colour} {['round', 'square'][shape]} flag",
                "images": [] if index == 11 else names[:2],
            }
        )
        seen = index < 8
        row = {"entity_id": f"Q{index}", "data_split": f"val_{'seen' if seen else 'unseen'}"}
        if seen:
            pairs.append({**row, "data_id": f"t{index}", "image": names[2], "data_split": "train"})
        validation.append({**row, "data_id": f"v{index}", "image": names[3]})
    paths = {}
    for name, rows in {"catalog": entities, "pairs": pairs, "validation": validation}.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Dataset(folder=folder, **paths)
