"""Checkpoints and catalogs to export, made up: what they hold is random, what they cost is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks.generative.models import ENCODERS
from benchmarks.synthetic import photograph
from imaging import Preprocessing
from model.adaptor import Adaptor, AdaptorConfig
from model.checkpoint import save_checkpoint
from model.encoders import open_image_encoder, open_text_encoder
from model.encoders.tiny import TinyConfig, TinyEncoder, save_tiny

_WORDS = (
    "river",
    "stone",
    "tower",
    "bird",
    "market",
    "north",
    "island",
    "castle",
    "music",
    "harbour",
    "forest",
    "valley",
)
_IMAGES = 1000  # different ones; a larger catalog uses them again


def make_checkpoint(folder: Path, image_encoder: str, text_encoder: str, *, width: int, heads: int = 2) -> Path:
    """A checkpoint with an adaptor of random weights over two encoders, by their specs."""
    image, text = open_image_encoder(image_encoder), open_text_encoder(text_encoder)
    config = AdaptorConfig(
        patch_dim=image.patch_dim,
        text_dim=text.dim,
        embedding_dim=image.embedding_dim,
        width=width,
        layers=2,
        heads=heads,
    )
    torch.manual_seed(0)
    save_checkpoint(
        folder, adaptor=Adaptor(config), logit_scale=10.0, image_encoder=image, text_encoder=text, training={}
    )
    return folder


def write_small_encoders(folder: Path) -> tuple[str, str]:
    """Encoders that cost next to nothing, so that everything else of an export shows: their specs."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=32, size_px=32)
    grey = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(
        size_px=32, resize="squash", crop="none", interpolation="bilinear", mean=grey, std=grey
    )
    save_tiny(TinyEncoder(config).eval(), preprocessing, folder / "small.safetensors")
    text = BertConfig(
        vocab_size=1 + len(_WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(text).save_pretrained(folder / "text")
    _save_tokenizer(folder / "text")
    return f"tiny:{folder / 'small.safetensors'}", f"hf:{folder / 'text'}"


def large_encoders(folder: Path) -> tuple[str, str]:
    """The specs of what `write_large_encoders` writes there."""
    return f"hf:{folder / 'image'}", f"hf:{folder / 'text'}"


def write_large_encoders(folder: Path) -> None:
    """Encoders of the shapes of CLIP ViT-L/14 and Llama 3.2 1B, of random weights in 16 bits."""
    from transformers import CLIPVisionModelWithProjection, LlamaConfig, LlamaModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.utils import IMAGE_PROCESSOR_NAME, logging

    logging.disable_progress_bar()
    shape = ENCODERS["vit-l14"]
    text = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(shape.config()).half().save_pretrained(folder / "image")
    processor = {
        "do_resize": True, "size": {"shortest_edge": shape.size_px}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": shape.size_px, "width": shape.size_px}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "image" / IMAGE_PROCESSOR_NAME).write_text(json.dumps(processor), encoding="utf-8")
    LlamaModel(text).bfloat16().save_pretrained(folder / "text")
    _save_tokenizer(folder / "text")


def _save_tokenizer(folder: Path) -> None:
    """One token a word."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(("[UNK]", *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def write_catalog(folder: Path, records: int, *, words: int, size_px: int, image_every: int) -> Path:
    """A catalog of so many entities with a text of `words` words; every `image_every`th has an image of `size_px`."""
    (folder / "images").mkdir(parents=True)
    for number in range(min(_IMAGES, -(-records // image_every))):
        (folder / "images" / f"{number}.jpg").write_bytes(photograph(number, size_px, size_px))
    random = np.random.default_rng(0)
    path = folder / "catalog.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(records):
            has_image = number % image_every == 0
            row = {
                "entity_id": f"Q{number}",
                "title": f"Thing {number}",
                "text": f"Thing {number}. " + " ".join(random.choice(_WORDS, words)),
                "images": [f"images/{number // image_every % _IMAGES}.jpg"] if has_image else [],
            }
            file.write(json.dumps(row) + "\n")
    return path
