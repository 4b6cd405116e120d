"""A small checkpoint of random weights, and a catalog with every kind of bad record."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.config import ExportConfig
from export.onnx import export_image_encoder
from export.pipeline import export_bundle
from imaging import Preprocessing
from model.adaptor import Adaptor, AdaptorConfig
from model.checkpoint import save_checkpoint
from model.encoders import ImageEncoder, open_image_encoder, open_text_encoder
from model.encoders.tiny import TinyConfig, TinyEncoder, save_tiny

ENTITIES = 23
SIZE_PX = 32


@dataclass(frozen=True, kw_only=True)
class CatalogFiles:
    """A catalog and its counts. `rejected` counts bad records, `images_failed` unusable images."""

    path: Path
    images: dict[str, Path]  # the first image of each entity that has one
    entities: int
    rejected: int
    images_failed: int
    without_image: int
    without_text: int


@pytest.fixture(scope="session")
def torch_encoder(tmp_path_factory: pytest.TempPathFactory) -> ImageEncoder:
    torch.manual_seed(4)
    config = TinyConfig(
        widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=24, size_px=SIZE_PX
    )
    grey = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(
        size_px=SIZE_PX, resize="squash", crop="none", interpolation="bilinear", mean=grey, std=grey
    )
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    save_tiny(TinyEncoder(config), preprocessing, path)
    return open_image_encoder(f"tiny:{path}")


@pytest.fixture(scope="session")
def image_encoder(tmp_path_factory: pytest.TempPathFactory, torch_encoder: ImageEncoder) -> ImageEncoder:
    """`torch_encoder` as an ONNX file: an export copies it, and converts nothing, which takes seconds."""
    folder = tmp_path_factory.mktemp("encoder")
    export_image_encoder(torch_encoder, folder)
    (folder / "image_encoder.json").write_text(json.dumps(torch_encoder.preprocessing.to_dict()))
    return open_image_encoder(f"onnx:{folder / 'image_encoder.onnx'}")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, image_encoder: ImageEncoder) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "ckpt", image_encoder)


@pytest.fixture(scope="session")
def torch_checkpoint(tmp_path_factory: pytest.TempPathFactory, torch_encoder: ImageEncoder) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "ckpt", torch_encoder)


def write_checkpoint(path: Path, image_encoder: ImageEncoder, *, centre: bool = False) -> Path:
    text_encoder = open_text_encoder("minilm")
    config = AdaptorConfig(
        patch_dim=image_encoder.patch_dim,
        text_dim=text_encoder.dim,
        embedding_dim=image_encoder.embedding_dim,
        width=16,
        layers=1,
        heads=2,
        centre=centre,
    )
    torch.manual_seed(5)
    adaptor = Adaptor(config)
    torch.nn.init.normal_(adaptor.out.weight, std=0.01)
    if adaptor.centre_D is not None:
        torch.nn.init.normal_(adaptor.centre_D, std=0.1)
    save_checkpoint(
        path,
        adaptor=adaptor,
        logit_scale=10.0,
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        training={},
    )
    return path


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, size=(3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((60, 40), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_catalog() -> Callable[[Path], CatalogFiles]:
    return write_catalog


@pytest.fixture(scope="session")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> CatalogFiles:
    return write_catalog(tmp_path_factory.mktemp("catalog"))


def write_catalog(folder: Path) -> CatalogFiles:
    (folder / "images").mkdir()
    lines: list[str] = []
    images: dict[str, Path] = {}
    without_image = without_text = images_failed = 0
    for number in range(ENTITIES):
        row: dict[str, Any] = {"entity_id": f"Q{number}", "title": f"Thing {number}", "types": ["thing"]}
        row["text"] = "" if number % 6 == 5 else f"Thing number {number} is a thing. It has a long story."
        without_text += number % 6 == 5
        names = [f"images/{number}_{view}.png" for view in range({0: 2, 3: 0}.get(number % 4, 1))]
        for view, name in enumerate(names):
            (folder / name).write_bytes(png(10 * number + view))
        if names:
            images[f"Q{number}"] = folder / names[0]
        else:
            without_image += 1
        row["images"] = names
        lines.append(json.dumps(row))
    broken = json.loads(lines[1])
    broken["images"] = ["images/broken.png", "images/none.png", "https://example.org/1.png", *broken["images"]]
    broken["image_credits"] = [{"author": "Bea"}, None, None, {"author": "Ann", "licence": "CC BY 4.0"}]
    (folder / "images/broken.png").write_bytes(png(1)[:60])
    lines[1] = json.dumps(broken)
    images_failed += 3
    lost = json.loads(lines[2])
    (folder / lost["images"][0]).unlink()
    del images["Q2"]
    images_failed += 1
    without_image += 1
    lines[7:7] = ["{not json", json.dumps({"entity_id": "", "title": "x"}), lines[0]]
    lines.append(json.dumps({"title": "no id, at the very end"}))
    path = folder / "catalog.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return CatalogFiles(
        path=path,
        images=images,
        entities=ENTITIES,
        rejected=4,
        images_failed=images_failed,
        without_image=without_image,
        without_text=without_text,
    )


@pytest.fixture(scope="session")
def int8_config(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, checkpoint: Path) -> ExportConfig:
    """An export with an int8 encoder, which is done. It is shared: no test may alter its bundle."""
    out = tmp_path_factory.mktemp("int8") / "things"
    config = ExportConfig(catalog=catalog.path, checkpoint=checkpoint, out=out, shard_size=9, device="cpu", int8=True)
    export_bundle(config)
    return config
