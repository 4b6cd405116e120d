"""Answer labelled queries with a trained bundle's image encoder alone: entities are found by their images.

The catalog's images are encoded with the bundle's encoder, pooled as the bundle does, and searched exactly.

Shapes: N images or means of a block of E entities, Q queries, B of them at once, K best results, F results to choose
from, D embedding width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catalog import EntityRecord, read_catalog
from catalog.formats import count_hint
from catalog.images import ImageReader, UnusableImage
from core.arrays import Float32Array, Int64Array, normalised
from evaluation.metrics import RECALL_AT, AnsweredQuery, rank_of
from index.embeddings import means
from index.top_k import best
from service.recognizer import Recognizer
from wikiclip.answers import Embedding

_ENTITIES_AT_ONCE = 512
_QUERIES_AT_ONCE = 4096
_IMAGES_AT_ONCE = 64


def answer_untrained(
    recognizer: Recognizer, answered: Sequence[AnsweredQuery], catalog: Path, *, held_out: frozenset[int]
) -> list[AnsweredQuery] | None:
    """Return the queries with the ranks of their entities by the catalog's images. Entities without any have no rank.

    Return None instead of a list if no image of the bundle's entities can be used.
    """
    top_k = max(RECALL_AT)
    searched = [number for number, each in enumerate(answered) if each.in_catalog and each.best]
    images = {number: str(answered[number].image) for number in searched if answered[number].embedding is None}
    embedded = dict(zip(images, _embed(recognizer, [*images.values()]), strict=True))
    embedded |= {
        number: normalised(np.array([answered[number].embedding], np.float32))[0]
        for number in searched
        if number not in images
    }
    queries = {number: each_D for number, each_D in embedded.items() if each_D is not None}
    queries_QD = np.array([*queries.values()], np.float32)
    rows_QK = np.full((len(queries), top_k), -1, np.int64)
    scores_QK = np.full(rows_QK.shape, -np.inf, np.float32)
    entities = 0
    for rows_E, vectors_ND, starts_E in _entities(recognizer, catalog, held_out):
        entities += len(rows_E)
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            scores_BE = np.maximum.reduceat(queries_QD[part] @ vectors_ND.T, starts_E, axis=1)
            scores_BF = np.concatenate([scores_QK[part], scores_BE], axis=1)
            rows_BF = np.concatenate([rows_QK[part], np.broadcast_to(rows_E, scores_BE.shape)], axis=1)
            kept_BK = np.argpartition(-scores_BF, top_k - 1, axis=1)[:, :top_k]
            rows_QK[part] = np.take_along_axis(rows_BF, kept_BK, axis=1)
            scores_QK[part] = np.take_along_axis(scores_BF, kept_BK, axis=1)
    if not entities:
        return None
    found = dict(zip(queries, best(rows_QK, scores_QK, top_k)[0].tolist(), strict=True))
    return [
        replace(
            each,
            rank=rank_of(each.entity.row, found[number]) if each.entity and number in found else None,
            best=None,
            in_catalog_probability=None,
            abstained=None,
        )
        for number, each in enumerate(answered)
    ]


def _entities(
    recognizer: Recognizer, catalog: Path, held_out: frozenset[int]
) -> Iterator[tuple[Int64Array, Float32Array, Int64Array]]:
    """Yield blocks of the bundle's entities that have a usable image: rows, vectors, and where each entity begins."""
    records = (item for item in read_catalog(catalog) if isinstance(item, EntityRecord))
    unusable = 0
    with (
        recognizer.acquire() as view,
        tqdm(desc="without training", unit="entity", total=count_hint(catalog)) as bar,
        view.loaded.bundle.store() as store,
    ):
        while block := list(islice(records, _ENTITIES_AT_ONCE)):
            known = store.by_ids([record.entity_id for record in block])
            entities = [(known[record.entity_id].row, record) for record in block if record.entity_id in known]
            images = [(row, image) for row, record in entities if row not in held_out for image in record.images]
            embeddings = _embed(recognizer, [image for _, image in images])
            usable = [(row, each_D) for (row, _), each_D in zip(images, embeddings, strict=True) if each_D is not None]
            unusable += len(images) - len(usable)
            bar.update(len(block))
            if not usable:
                continue
            rows_N = np.array([row for row, _ in usable])
            starts_E = np.flatnonzero(np.diff(rows_N, prepend=-1))
            rows_E = rows_N[starts_E]
            vectors_ND = normalised(np.stack([each_D for _, each_D in usable]).astype(np.float16))  # as stored
            if view.loaded.bundle.manifest.pooling == "mean":
                vectors_ND, starts_E = normalised(means(vectors_ND, starts_E)), np.arange(len(rows_E))
            yield rows_E, vectors_ND, starts_E
    if unusable:
        tqdm.write(f"{unusable} image(s) of {catalog} cannot be used, and are not searched", file=sys.stderr)


def _embed(recognizer: Recognizer, images: Sequence[str]) -> list[Float32Array | None]:
    """Return the embeddings of image files, None for those that cannot be read."""
    reader, embeddings = ImageReader(), list[Float32Array | None]()
    for start in range(0, len(images), _IMAGES_AT_ONCE):
        contents = []
        for image in images[start : start + _IMAGES_AT_ONCE]:
            try:
                contents.append(reader.read(image))
            except UnusableImage:
                contents.append(b"")  # does not decode
        embeddings += [
            np.array(each.embedding, np.float32) if isinstance(each, Embedding) else None
            for each in recognizer.embed_many(contents)
        ]
    return embeddings
