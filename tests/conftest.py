"""Fixtures that several packages' tests share: a small, complete bundle and the images of its entities."""

from __future__ import annotations

import gc
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from core.arrays import normalised
from core.runtime import onnxruntime
from imaging import Preprocessing, load_pixels, normalise
from index.build import build_index
from index.bundle import list_files, open_embeddings
from index.calibration import Calibration
from index.embeddings import EmbeddingShards, pooled, write_shard
from index.manifest import (
    MANIFEST_FILE,
    REMEMBERED_FOLDER,
    SCHEMA_VERSION,
    STORE_FILE,
    Counts,
    Gain,
    ImageEncoderEntry,
    Manifest,
    RememberedEntry,
)
from index.store import EntityStore, StoredEntity, write_store
from index.types import TypeParents
from model.encoders.text import load_minilm

SIZE_PX = 32
PATCH_PX = 8
PATCH_DIM = 16
EMBEDDING_DIM = 16
SHARD_SIZE = 5
GIRAFFE_CREDITS = ({"author": "Ann", "licence": "CC BY 4.0", "source": "https://example.org/giraffe"},)
# They start first, in this order: else one worker would run one of them alone at the end.
SLOW_FILES = (
    "packaging/test_tutorial.py",
    "export/test_ray.py",
    "benchmarks/test_commands.py",
    "benchmarks/test_generative_training.py",
    "model/test_distributed.py",
    "page/test_page.py",
    "service/test_agents.py",
    "service/test_scale.py",
)
CREATED_AT = "2026-01-01T00:00:00+00:00"


@dataclass(frozen=True, kw_only=True)
class FixtureEntity:
    entity_id: str
    title: str
    types: tuple[str, ...]
    symbol: str | None = None
    titles: Mapping[str, str] = field(default_factory=dict)
    images: int = 1


FIXTURE_ENTITIES = (
    FixtureEntity(
        entity_id="Q15083", title="Giraffe", types=("animal",), symbol="🦒", titles={"fr": "Girafe", "zh": "长颈鹿"}
    ),
    FixtureEntity(entity_id="Q140", title="Lion", types=("animal",), symbol="🦁", titles={"fr": "Lion"}),
    FixtureEntity(entity_id="Q32789", title="Zebra", types=("animal",), symbol="🦓"),
    FixtureEntity(entity_id="Q7378", title="Elephant", types=("animal",), symbol="🐘", images=3),
    FixtureEntity(entity_id="Q89", title="Apple", types=("fruit", "food"), symbol="🍎"),
    FixtureEntity(entity_id="Q503", title="Banana", types=("fruit", "food"), symbol="🍌"),
    FixtureEntity(entity_id="Q13191", title="Orange", types=("fruit", "food")),
    FixtureEntity(entity_id="flag:CI", title="Flag of Côte d’Ivoire", types=("flag",), symbol="🇨🇮"),
    FixtureEntity(
        entity_id="flag:JP", title="Flag of Japan", types=("flag",), symbol="🇯🇵", titles={"ja": "日本の国旗"}
    ),
    FixtureEntity(entity_id="flag:BR", title="Flag of Brazil", types=("flag",), symbol="🇧🇷"),
    FixtureEntity(entity_id="brand:a&b", title="A & B “Best” (brand)", types=("brand",)),
    FixtureEntity(entity_id="Q_no_image", title="Lion of Lucerne", types=("monument",), images=0),
)

PREPROCESSING = Preprocessing(
    size_px=SIZE_PX,
    resize="shortest",
    crop="center",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def start(item: pytest.Item) -> int:
        file = item.nodeid.split("::")[0].removeprefix("tests/")
        return SLOW_FILES.index(file) if file in SLOW_FILES else len(SLOW_FILES)

    items.sort(key=start)


def pytest_collection_finish() -> None:
    """Exempt what is imported from garbage collection, which would go through it hundreds of times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_minilm() -> Iterator[None]:
    """Load MiniLM once per process. It is frozen, and many commands open it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.encoders.text.load_minilm", cache(load_minilm))
        yield


@pytest.fixture(scope="session")
def small_images() -> dict[str, bytes]:
    """The first image of each entity of `small_bundle` that has one, as PNG bytes by entity_id."""
    return {
        entity.entity_id: draw_png(seed=100 * row) for row, entity in enumerate(FIXTURE_ENTITIES) if entity.images > 0
    }


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete bundle of 12 entities, called `small`: a query with one of `small_images` finds that entity at a
    score of about 1. Some have thumbnails, several images, titles in other languages; it has a calibration.

    It is shared: a test that alters a bundle copies it first.
    """
    bundle = tmp_path_factory.mktemp("bundles") / "small"
    write_small_bundle(bundle)
    return bundle


@pytest.fixture(scope="session")
def pooled_bundle(tmp_path_factory: pytest.TempPathFactory, small_bundle: Path) -> Path:
    """`small_bundle` with the pooling "mean"."""
    bundle = tmp_path_factory.mktemp("bundles") / "pooled"
    shutil.copytree(small_bundle, bundle)
    pool_by_mean(bundle)
    return bundle


def add_type_parents(bundle: Path, parents: Mapping[str, Sequence[str]]) -> None:
    """Give a bundle's types parents."""
    with EntityStore(bundle / STORE_FILE) as store:
        entities = store.by_rows(range(len(store)))
        thumbnails = store.thumbnails([each.row for each in entities])
    rows = [TypeParents(type=each, parents=tuple(above)) for each, above in parents.items()]
    write_store(bundle / STORE_FILE, ((each, thumbnails.get(each.row)) for each in entities), rows)
    manifest = Manifest.read(bundle / MANIFEST_FILE).model_copy(update={"files": list_files(bundle)})
    manifest.write(bundle / MANIFEST_FILE)


def pool_by_mean(bundle: Path) -> None:
    """Change a bundle's pooling to "mean"."""
    changed = {"schema_version": 2, "pooling": "mean"}
    manifest = Manifest.read(bundle / MANIFEST_FILE).model_copy(update=changed)
    manifest.write(bundle / MANIFEST_FILE)
    build_index(bundle, pooled(open_embeddings(bundle, manifest), "mean"), created_at=CREATED_AT)


def add_remembered(bundle: Path, rows: Sequence[int], *, handicap: float, seed: int = 0) -> None:
    """Give the entities at `rows` random remembered vectors."""
    manifest = Manifest.read(bundle / MANIFEST_FILE)
    vectors_MD = np.random.default_rng(seed).normal(size=(len(rows), manifest.embedding_dim)).astype(np.float32)
    (bundle / REMEMBERED_FOLDER).mkdir()
    write_shard(bundle / REMEMBERED_FOLDER, 0, np.array(rows, np.int64), normalised(vectors_MD))
    gain = Gain(queries=len(rows), before=50.0, after=60.0)
    entry = RememberedEntry(entities=len(rows), pictures=2 * len(rows), handicap=handicap, seen=gain, held_out=gain)
    changed = {"schema_version": 2, "remembered": entry, "files": list_files(bundle)}
    manifest.model_copy(update=changed).write(bundle / MANIFEST_FILE)


def write_small_bundle(bundle: Path, *, prefix: str = "", encoder_seed: int = 11) -> None:
    """Write the bundle of `small_bundle`, its entity ids after a `prefix`, the encoder's weights drawn from a seed."""
    entities = [replace(entity, entity_id=prefix + entity.entity_id) for entity in FIXTURE_ENTITIES]
    (bundle / "embeddings").mkdir(parents=True)
    encoder_file = bundle / "image_encoder.onnx"
    encoder_file.write_bytes(random_encoder(encoder_seed).SerializeToString(deterministic=True))
    session = onnxruntime.InferenceSession(encoder_file, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(5)
    rows: list[int] = []
    embeddings: list[npt.NDArray[np.float32]] = []
    for row, entity in enumerate(entities):
        for number in range(max(entity.images, 1)):
            rows.append(row)
            if entity.images == 0:
                embedding = rng.normal(size=EMBEDDING_DIM).astype(np.float32)
                embeddings.append(embedding / np.linalg.norm(embedding))
            else:
                embeddings.append(embed(session, draw_png(seed=100 * row + number)))
    for shard, start in enumerate(range(0, len(rows), SHARD_SIZE)):
        part = slice(start, start + SHARD_SIZE)
        write_shard(bundle / "embeddings", shard, np.array(rows[part], np.int64), np.stack(embeddings[part]))
    write_store(
        bundle / STORE_FILE,
        ((stored_entity(row, entity), thumbnail(row, entity)) for row, entity in enumerate(entities)),
    )
    build_index(bundle, EmbeddingShards(bundle / "embeddings", EMBEDDING_DIM), created_at=CREATED_AT)
    Manifest(
        schema_version=SCHEMA_VERSION,
        name=bundle.name,
        model={"image_encoder": "onnx:random.onnx", "text_encoder": "none", "adaptor": None, "checkpoint_sha256": None},
        preprocessing=PREPROCESSING.to_dict(),
        embedding_dim=EMBEDDING_DIM,
        patches=(SIZE_PX // PATCH_PX) ** 2,
        counts=Counts(
            entities=len(FIXTURE_ENTITIES), embeddings=len(rows), without_image=1, without_text=0, rejected=0
        ),
        calibration=Calibration(
            slope=20.0, none_offset=10.0, none_slope=0.0, abstain_below=0.5, queries=20, correct=10, unknown=5
        ).to_dict(),
        image_encoder=ImageEncoderEntry(
            file="image_encoder.onnx",
            input="pixel_values",
            outputs=("patch_tokens", "image_embedding"),
            parity={"max_abs_diff": 0.0, "min_cosine": 1.0},
        ),
        export={},
        files=list_files(bundle),
        created_at=CREATED_AT,
        elapsed_s=0.0,
    ).write(bundle / "manifest.json")


def stored_entity(row: int, entity: FixtureEntity) -> StoredEntity:
    return StoredEntity(
        row=row,
        entity_id=entity.entity_id,
        title=entity.title,
        titles=entity.titles,
        description=f"{entity.title}, a {entity.types[0]}",
        url=f"https://en.wikipedia.org/wiki/{entity.title.replace(' ', '_')}",
        types=entity.types,
        symbol=entity.symbol,
        image_count=entity.images,
        has_text=True,
        image_credits=GIRAFFE_CREDITS if entity.title == "Giraffe" else (),
    )


def thumbnail(row: int, entity: FixtureEntity) -> bytes | None:
    if entity.images == 0 or entity.symbol is not None:
        return None
    buffer = io.BytesIO()
    Image.open(io.BytesIO(draw_png(seed=100 * row))).resize((24, 24)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def draw_png(*, seed: int) -> bytes:
    """An image of 48x40 pixels of its own: a coloured ground with some ellipses and bars."""
    rng = np.random.default_rng(seed)

    def colour() -> tuple[int, int, int]:
        red, green, blue = (int(value) for value in rng.integers(0, 256, size=3))
        return red, green, blue

    image = Image.new("RGB", (48, 40), colour())
    draw = ImageDraw.Draw(image)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse, draw.rectangle):
        left, top = (int(value) for value in rng.integers(0, 30, size=2))
        width, height = (int(value) for value in rng.integers(8, 24, size=2))
        shape((left, top, left + width, top + height), fill=colour())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def embed(session: onnxruntime.InferenceSession, image: bytes) -> npt.NDArray[np.float32]:
    """The image embedding float32 [D] of an encoded image."""
    pixels_HW3 = load_pixels(image, PREPROCESSING, max_pixels=1_000_000)
    (embedding_1D,) = session.run(["image_embedding"], {"pixel_values": normalise(pixels_HW3[None], PREPROCESSING)})
    embedding_D: npt.NDArray[np.float32] = embedding_1D[0]
    return embedding_D


def random_encoder(seed: int = 11) -> onnx.ModelProto:
    """An image encoder of fixed random weights: patches by convolution, their projection, normalised, as embedding."""
    rng = np.random.default_rng(seed)
    patches = (SIZE_PX // PATCH_PX) ** 2
    weights = {
        "patch_weight": rng.normal(size=(PATCH_DIM, 3, PATCH_PX, PATCH_PX)).astype(np.float32) / PATCH_PX,
        "projection": rng.normal(size=(patches * PATCH_DIM, EMBEDDING_DIM)).astype(np.float32),
        "grid_shape": np.array([0, PATCH_DIM, patches], np.int64),
        "flat_shape": np.array([0, patches * PATCH_DIM], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["pixel_values", "patch_weight"], ["grid"], strides=[PATCH_PX, PATCH_PX]),
        helper.make_node("Reshape", ["grid", "grid_shape"], ["channels_first"]),
        helper.make_node("Transpose", ["channels_first"], ["patch_tokens"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["patch_tokens", "flat_shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["projected"]),
        helper.make_node("LpNormalization", ["projected"], ["image_embedding"], axis=1, p=2),
    ]
    graph = helper.make_graph(
        nodes,
        "random_encoder",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIZE_PX, SIZE_PX])],
        [
            helper.make_tensor_value_info("patch_tokens", TensorProto.FLOAT, ["batch", patches, PATCH_DIM]),
            helper.make_tensor_value_info("image_embedding", TensorProto.FLOAT, ["batch", EMBEDDING_DIM]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], producer_name="wikiclip")
    model.ir_version = 9
    onnx.checker.check_model(model)
    return model
