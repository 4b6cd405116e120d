"""Read, embed and search queries while an export is made: validation queries, labelled pictures, catalog images.

Shapes: N queries, K best entities, F = K + 1 of a search, B batch, D embedding width, H = W = size_px. Scores fall
along K and F. NaN pads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catalog import is_url
from catalog.images import ImageReader, UnusableImage
from core.arrays import BoolArray, Float32Array, Float64Array, Int64Array, Pixels, normalised
from core.errors import BadParameter, TooLarge, UndecodableImage, UnknownEntity
from core.lines import Rejected, excerpt, read_jsonl
from export.config import ExportConfig
from export.decode import image_decoder
from export.model import ExportModel
from export.onnx import INPUT, output_names
from export.shards import EntityImages
from imaging import Preprocessing
from index.calibration import CANDIDATES
from index.embeddings import read_embedding
from index.manifest import (
    FLOAT16_ENCODER_FILE,
    IMAGE_ENCODER_FILE,
    INT8_ENCODER_FILE,
    FileEntry,
    ImageEncoderEntry,
    encoder_hash,
)
from index.search import EntityIndex
from index.store import EntityStore
from model.data import QueryEmbedding, has_embedding

QueryImage = Pixels | Float32Array  # the pixels [H, W, 3] of a query, or its embedding [D] if only that was kept
Reject = Callable[[Rejected], None]


@dataclass(frozen=True, kw_only=True)
class LabelledQueries:
    """Embedded queries with the row of the entity that each shows, or -1, and the number of that entity.

    `hashes` has the `hash_query` of each if they were images.
    """

    own_N: Int64Array
    group_N: Int64Array
    embeddings_ND: Float32Array
    hashes: frozenset[bytes] = frozenset()


@dataclass(frozen=True, kw_only=True)
class LabelledSearch:
    """What a search found for labelled queries: one entity more than a calibration uses.

    `made_up` queries are changed copies of the catalog's images.
    """

    own_N: Int64Array
    group_N: Int64Array
    rows_NF: Int64Array
    scores_NF: Float64Array
    embeddings_ND: Float32Array
    made_up: bool = False

    @property
    def scores(self) -> Float64Array:
        """The best scores `[N, K]`."""
        return self.scores_NF[:, :CANDIDATES]

    @property
    def in_catalog(self) -> BoolArray:
        """Whether the catalog has each query's entity `[N]`."""
        return self.own_N >= 0

    @property
    def right(self) -> BoolArray:
        """Which rows are the query's own entity `[N, F]`."""
        right_NF: BoolArray = (self.rows_NF == self.own_N[:, None]) & (self.rows_NF >= 0)
        return right_NF

    @property
    def scores_without(self) -> Float64Array:
        """The best scores with the query's own entity left out of the catalog `[N, K]`."""
        others = [scores_F[~right_F][:CANDIDATES] for scores_F, right_F in zip(self.scores_NF, self.right, strict=True)]
        return np.array(others, np.float64).reshape(-1, CANDIDATES)


def embed_validation(
    path: Path, config: ExportConfig, model: ExportModel, store: EntityStore, embeddings: QueryEmbeddings,
    reject: Reject,
) -> LabelledQueries:  # fmt: skip
    """Read and embed validation queries. Raise `CatalogError` if the file cannot be read."""
    entity_ids: list[str] = []
    hashes: set[bytes] = set()

    def images() -> Iterator[QueryImage]:
        for entity_id, image in read_queries(path, model.image_encoder.preprocessing, reject, embeddings):
            entity_ids.append(entity_id)
            hashes.add(hash_query(image))
            yield image

    shown = tqdm(images(), desc="validation", unit="query", disable=not config.progress)
    embeddings_ND = embed_images(shown, config, model)
    return LabelledQueries(
        own_N=np.array([row_of(entity_id, store) for entity_id in entity_ids], np.int64),
        group_N=np.unique(entity_ids, return_inverse=True)[1],
        embeddings_ND=embeddings_ND,
        hashes=frozenset(hashes),
    )


def read_queries(
    path: Path, preprocessing: Preprocessing, reject: Reject, embeddings: QueryEmbeddings | None = None
) -> Iterator[tuple[str, QueryImage]]:
    """Yield the right entity of each query and its pixels [H, W, 3], or its embedding [D] if there are `embeddings`."""
    for item in read_jsonl(path):
        if isinstance(item, Rejected):
            reject(Rejected(line=item.line, reason=f"{path.name}: {item.reason}", record=item.record))
            continue
        line, row = item
        image, entity_id = row.get("image"), row.get("entity_id")
        query: QueryImage
        try:
            if embeddings is not None and has_embedding(row) and isinstance(entity_id, str):
                query = embeddings.read(QueryEmbedding.of(row))
            elif isinstance(image, str) and isinstance(entity_id, str):
                data = ImageReader().read(image if is_url(image) else str(path.parent / image))
                query = image_decoder().load_pixels(data, preprocessing)
            else:
                raise UnusableImage("`image` and `entity_id` must be strings")
        except (UnusableImage, UndecodableImage, TooLarge, BadParameter) as error:
            reject(Rejected(line=line, reason=f"{path.name}: {error}", record=excerpt(row)))
            continue
        yield entity_id, query


class QueryEmbeddings:
    """Accepts embeddings by the image encoder of an unfinished bundle, in any precision that the bundle has."""

    def __init__(self, model: ExportModel, bundle: Path) -> None:
        self._encoder = model.image_encoder
        self._bundle = bundle

    def read(self, embedding: QueryEmbedding) -> Float32Array:
        """Return an embedding [D]. Raises `BadParameter`, whose message is a reason to reject it."""
        if embedding.encoder is not None and embedding.encoder not in self._hashes:
            raise BadParameter(
                f"the embedding is by the encoder {embedding.encoder[:64]}, not by the one exported here; embed the "
                "image again"
            )
        embedding_D = read_embedding(embedding.values, self._encoder.embedding_dim)
        return normalised(embedding_D[None]).reshape(-1)

    @cached_property
    def _hashes(self) -> frozenset[str]:
        files = {file.name: FileEntry.of(file) for file in self._bundle.iterdir() if file.is_file()}
        outputs, preprocessing = output_names(self._encoder), self._encoder.preprocessing.to_dict()
        entry = ImageEncoderEntry(file=IMAGE_ENCODER_FILE, input=INPUT, outputs=outputs, parity={})
        precisions = {IMAGE_ENCODER_FILE, INT8_ENCODER_FILE, FLOAT16_ENCODER_FILE} & files.keys()
        return frozenset(encoder_hash(files, entry, preprocessing, file) for file in precisions)


def catalog_images(
    config: ExportConfig, preprocessing: Preprocessing, sample: Sequence[EntityImages]
) -> Iterator[tuple[int, Pixels]]:
    """Yield the row and the first usable image of each sampled entity. The others are in the reject log already."""
    reader = ImageReader(config.images)
    for row, images in sample:
        for image in images:
            try:
                pixels_HW3 = image_decoder().load_pixels(reader.read(image), preprocessing)
            except (UnusableImage, UndecodableImage, TooLarge):
                continue
            yield row, pixels_HW3
            break


def embed_images(images: Iterable[QueryImage], config: ExportConfig, model: ExportModel) -> Float32Array:
    """Return the query embeddings [N, D] of images."""
    embeddings = [np.zeros((0, model.image_encoder.embedding_dim), np.float32)]
    remaining = iter(images)
    while batch := list(islice(remaining, config.batch_size)):
        pixels = [each for each in batch if each.dtype == np.uint8]
        embedded = iter(model.embed_queries(np.stack(pixels)) if pixels else ())
        embeddings.append(np.stack([next(embedded) if each.dtype == np.uint8 else each for each in batch]))
    return np.concatenate(embeddings)


def search_labelled(queries: LabelledQueries, config: ExportConfig, index: EntityIndex) -> LabelledSearch:
    """Search for validation queries."""
    rows_NF, scores_NF = search_embeddings(queries.embeddings_ND, config, index)
    return LabelledSearch(
        own_N=queries.own_N,
        group_N=queries.group_N,
        rows_NF=rows_NF,
        scores_NF=scores_NF,
        embeddings_ND=queries.embeddings_ND,
        made_up=config.validation_made_up,
    )


def search_embeddings(
    embeddings_ND: Float32Array, config: ExportConfig, index: EntityIndex, count: int = CANDIDATES + 1
) -> tuple[Int64Array, Float64Array]:
    """Return the best `count` rows and scores [N, F] of queries, padded with row -1 and NaN."""
    rows = [np.zeros((0, count), np.int64)]
    scores = [np.zeros((0, count))]
    for start in range(0, len(embeddings_ND), config.batch_size):
        rows_BF, scores_BF = index.search(embeddings_ND[start : start + config.batch_size], count)
        rows.append(rows_BF)
        scores.append(np.where(rows_BF < 0, np.nan, scores_BF.astype(np.float64)))
    return np.concatenate(rows), np.concatenate(scores)


def hash_query(image: QueryImage) -> bytes:
    """Return a hash that equal images have in common, whatever their files."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def row_of(entity_id: str, store: EntityStore) -> int:
    """Return the entity's row, or -1."""
    try:
        return store.get(entity_id).row
    except UnknownEntity:
        return -1
