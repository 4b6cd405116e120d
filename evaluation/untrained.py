"""Answer labelled queries with a trained bundle's image encoder alone: entities are found by their images.

The catalog's images are encoded with the bundle's encoder, pooled as the bundle does, and searched exactly.

Shapes: N images or means of a block of E entities, Q queries, B of them at once, K best results, F results to choose
from, D embedding width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catalog import EntityRecord, read_catalog
from catalog.formats import count_hint
from catalog.images import MAX_PIXELS, ImageReader, UnusableImage
from core.arrays import Float32Array, Int64Array, Pixels, normalised
from core.errors import TooLarge, UndecodableImage
from core.runtime import usable_cores
from evaluation.metrics import RECALL_AT, AnsweredQuery, rank_of
from imaging import Decoder, automatic_budget
from index.bundle import Bundle
from index.embeddings import means
from index.top_k import best
from service.loaded_bundle import LoadedBundle
from service.recognizer import Recognizer

_ENTITIES_AT_ONCE = 512
_QUERIES_AT_ONCE = 4096
_TIMEOUT_S = 30.0  # to decode an image

_Embed = Callable[[Sequence[str]], list[Float32Array | None]]


def answer_untrained(
    recognizer: Recognizer, answered: Sequence[AnsweredQuery], catalog: Path, *, held_out: frozenset[int]
) -> list[AnsweredQuery] | None:
    """Return the queries with the ranks of their entities by the catalog's images. Entities without any have no rank.

    Return None instead of a list if no image of the bundle's entities can be used.
    """
    top_k = max(RECALL_AT)
    searched = [number for number, each in enumerate(answered) if each.in_catalog and each.best]
    with recognizer.acquire() as view, _open_embedder(recognizer, view.loaded) as embed:
        images = {number: str(answered[number].image) for number in searched if answered[number].embedding is None}
        embedded = dict(zip(images, embed([*images.values()]), strict=True))
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
        for rows_E, vectors_ND, starts_E in _entities(embed, view.loaded.bundle, catalog, held_out):
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
    embed: _Embed, bundle: Bundle, catalog: Path, held_out: frozenset[int]
) -> Iterator[tuple[Int64Array, Float32Array, Int64Array]]:
    """Yield blocks of the bundle's entities that have a usable image: rows, vectors, and where each entity begins."""
    records = (item for item in read_catalog(catalog) if isinstance(item, EntityRecord))
    unusable = 0
    with bundle.store() as store, tqdm(desc="without training", unit="entity", total=count_hint(catalog)) as bar:
        while block := list(islice(records, _ENTITIES_AT_ONCE)):
            known = store.by_ids([record.entity_id for record in block])
            entities = [(known[record.entity_id].row, record) for record in block if record.entity_id in known]
            images = [(row, image) for row, record in entities if row not in held_out for image in record.images]
            embeddings = embed([image for _, image in images])
            usable = [(row, each_D) for (row, _), each_D in zip(images, embeddings, strict=True) if each_D is not None]
            unusable += len(images) - len(usable)
            bar.update(len(block))
            if not usable:
                continue
            rows_N = np.array([row for row, _ in usable])
            starts_E = np.flatnonzero(np.diff(rows_N, prepend=-1))
            rows_E = rows_N[starts_E]
            vectors_ND = normalised(np.stack([each_D for _, each_D in usable]).astype(np.float16))  # as stored
            if bundle.manifest.pooling == "mean":
                vectors_ND, starts_E = normalised(means(vectors_ND, starts_E)), np.arange(len(rows_E))
            yield rows_E, vectors_ND, starts_E
    if unusable:
        tqdm.write(f"{unusable} image(s) of {catalog} cannot be used, and are not searched", file=sys.stderr)


@contextmanager
def _open_embedder(recognizer: Recognizer, loaded: LoadedBundle) -> Iterator[_Embed]:
    """Yield a function that reads and encodes images. It returns None for those that it cannot read."""
    reader, cores = ImageReader(), usable_cores()
    batch_size = recognizer.settings.batch_limit(loaded.encoder.device)
    decoder = Decoder(
        max_pixels=MAX_PIXELS, budget_bytes=automatic_budget(), timeout_s=_TIMEOUT_S, threads=cores, processes=cores
    )
    with closing(decoder), ThreadPoolExecutor(cores) as threads:

        def decode(image: str) -> Pixels | None:
            try:
                return decoder.load_pixels(reader.read(image), loaded.preprocessing)
            except (UnusableImage, UndecodableImage, TooLarge):
                return None

        def embed(images: Sequence[str]) -> list[Float32Array | None]:
            embeddings: list[Float32Array | None] = []
            for start in range(0, len(images), batch_size):
                decoded = list(threads.map(decode, images[start : start + batch_size]))
                usable = [pixels_HW3 for pixels_HW3 in decoded if pixels_HW3 is not None]
                encoded = iter(loaded.encoder.encode(np.stack(usable)) if usable else ())
                embeddings += [None if pixels_HW3 is None else next(encoded) for pixels_HW3 in decoded]
            return embeddings

        yield embed
