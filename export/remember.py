"""Keep labelled pictures as remembered vectors (`--remember`), with a handicap chosen on queries.

An entity's remembered vector is the normalised mean of its pictures' query embeddings. Queries are the validation
queries, or without a checkpoint and those, the pictures themselves. A checkpoint that was trained on the pictures finds
them too well: they would show no gain, and would let memory win against entities that were not trained.

The handicap has the best harmonic mean of two accuracies:

- seen: queries of entities with a remembered vector. A picture is left out of its own;
- held out: all queries, without the whole vector of their entity, while all others stay. Memory can only lose these.
  The handicap and the next smaller one must lose none (of 500 or more that are found, at most one in 500).

If no such handicap finds more seen queries, nothing is remembered.

Shapes: M remembered entities, Q queries, H handicaps, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, tee
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catalog.images import ImageReader
from core.arrays import Float16Array, Float32Array, Float64Array, Int64Array, normalised
from core.errors import BadParameter, UserError
from core.lines import Rejected, RejectLog
from core.statistics import Reservoir
from export.config import ExportConfig
from export.decode import DecodePool, ImageJob, default_workers
from export.model import ExportModel, ImageModel
from export.queries import (
    LabelledQueries,
    QueryEmbeddings,
    QueryImage,
    Reject,
    embed_images,
    hash_query,
    row_of,
    search_embeddings,
)
from index.embeddings import Embeddings, write_shard
from index.manifest import Gain, RememberedEntry
from index.remembered import Remembered
from index.search import EntityIndex
from index.store import EntityStore
from model.data import Pair, read_pairs

_HANDICAPS_H = np.arange(21) / 50  # 0 to 0.4
_MAX_QUERIES = 4096
_RIGHT_PER_LOSS = 500  # held-out pictures; without it, one outlier among thousands would decide
_SAME_IMAGE = 0.9999  # cosine


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Queries with the row of their entity and the cosine of its remembered vector, minus infinity if it has none."""

    own_Q: Int64Array
    embeddings_QD: Float32Array
    remembered_Q: Float64Array


@dataclass(kw_only=True)
class LabelledPictures:
    """Sums of query embeddings by entity row, how many each sum has, and a sample of rows and embeddings."""

    sums: dict[int, Float64Array] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    sample: Reservoir[tuple[int, Float32Array]] = field(default_factory=lambda: Reservoir(_MAX_QUERIES))

    def add(self, row: int, embedding_D: Float32Array) -> None:
        self.sums[row] = self.sums.get(row, np.float64(0)) + embedding_D
        self.counts[row] += 1
        self.sample.add((row, embedding_D))

    def queries(self) -> Queries:
        """Return the sample as queries, each left out of its entity's vector."""
        own_Q = np.array([row for row, _ in self.sample.items], np.int64)
        embeddings_QD = np.stack([embedding_D for _, embedding_D in self.sample.items])
        others_QD = np.stack([self.sums[row] for row in own_Q.tolist()]) - embeddings_QD
        scores_Q = (normalised(others_QD.astype(np.float32)) * embeddings_QD).sum(axis=1)
        several_Q = np.array([self.counts[row] > 1 for row in own_Q.tolist()])
        return Queries(own_Q=own_Q, embeddings_QD=embeddings_QD, remembered_Q=np.where(several_Q, scores_Q, -np.inf))

    def vectors(self) -> tuple[Int64Array, Float16Array]:
        """Return the rows [M] and the remembered vectors [M, D] to store."""
        rows = sorted(self.sums)
        means_MD = normalised(np.stack([self.sums[row] for row in rows]).astype(np.float32))
        return np.array(rows, np.int64), means_MD.astype(np.float16)


def remember(
    path: Path,
    folder: Path,
    config: ExportConfig,
    model: ExportModel,
    images: Embeddings,
    index: EntityIndex,
    store: EntityStore,
    log: RejectLog,
    validation: LabelledQueries | None,
    embeddings: QueryEmbeddings,
) -> tuple[Remembered, RememberedEntry] | None:
    """Write the remembered vectors of the pairs at `path` into the new `folder`, unless no handicap helps.

    Pictures that cannot be used are logged. Raise `UserError` if no picture can be used, or if some are validation
    queries, too.
    """

    def reject(item: Rejected) -> None:
        log.add(replace(item, reason=f"{path.name}: {item.reason}"))

    pictures = LabelledPictures()
    known: set[tuple[int, bytes]] = set()
    shared = 0
    read = _read_pictures(path, config, model, images, store, embeddings, reject)
    shown = iter(tqdm(read, desc="remember", unit="picture", disable=not config.progress))
    while batch := list(islice(shown, config.batch_size)):
        embeddings_BD = embed_images([image for _, _, image in batch], config, model)
        for (pair, row, image), embedding_D in zip(batch, embeddings_BD, strict=True):
            digest = hash_query(image)
            shared += validation is not None and digest in validation.hashes
            # Without a checkpoint, the catalog's images are embedded like queries.
            if isinstance(model, ImageModel) and np.any(images.images_of(row) @ embedding_D > _SAME_IMAGE):
                reject(_rejected(pair, "the catalog has this image of the entity already"))
            elif (row, digest) not in known:
                known.add((row, digest))
                pictures.add(row, embedding_D)
    if shared:
        raise UserError(
            f"{shared} of the pictures of --remember are --validation queries, too, and would find themselves; leave "
            "them out of one of the files, and go on with --resume"
        )
    if not pictures.sums:
        raise UserError(
            f"{path} has no usable picture of an entity in the catalog, see {log.path}; correct it, and go on with "
            "--resume, or leave --remember out"
        )
    rows_M, vectors_MD = pictures.vectors()
    vectors = Embeddings(images.dim, [vectors_MD], [rows_M])
    queries = pictures.queries() if validation is None else _validation_queries(validation, vectors)
    if (chosen := choose_handicap(queries, vectors, config, index)) is None:
        return None
    folder.mkdir()
    write_shard(folder, 0, rows_M, vectors_MD)
    handicap, seen, held_out = chosen
    entry = RememberedEntry(
        entities=len(vectors), pictures=pictures.counts.total(), handicap=handicap, seen=seen, held_out=held_out
    )
    return Remembered(vectors, handicap), entry


def _validation_queries(validation: LabelledQueries, vectors: Embeddings) -> Queries:
    known_N = validation.own_N >= 0
    own_Q, embeddings_QD = validation.own_N[known_N], validation.embeddings_ND[known_N]
    remembered = Remembered(vectors, 0.0)
    scores = [remembered.score(query_D, row) for query_D, row in zip(embeddings_QD, own_Q.tolist(), strict=True)]
    return Queries(own_Q=own_Q, embeddings_QD=embeddings_QD, remembered_Q=np.array(scores))


def choose_handicap(
    queries: Queries, vectors: Embeddings, config: ExportConfig, index: EntityIndex
) -> tuple[float, Gain, Gain] | None:
    """Return the best handicap and what it does to seen and held-out queries, or None if none helps.

    `index` remembers nothing yet.
    """
    own_Q, queries_QD = queries.own_Q, queries.embeddings_QD
    rows_Q2, scores_Q2 = search_embeddings(queries_QD, config, index, 2)
    scores_Q2 = np.where(rows_Q2 < 0, -np.inf, scores_Q2)
    is_own_Q2 = rows_Q2 == own_Q[:, None]
    own_score_Q = np.where(is_own_Q2, scores_Q2, -np.inf).max(axis=1)  # below the second, it never matters
    other_Q = np.where(is_own_Q2, -np.inf, scores_Q2).max(axis=1)
    remembered_other_Q = np.full(len(own_Q), -np.inf)
    remembered = Remembered(vectors, 0.0)
    for start in range(0, len(own_Q), config.batch_size):
        part = slice(start, start + config.batch_size)
        rows_B2, cosines_B2 = remembered.search(queries_QD[part], 2)
        remembered_other_Q[part] = np.where(rows_B2 == own_Q[part, None], -np.inf, cosines_B2).max(axis=1)

    seen_Q = queries.remembered_Q > -np.inf
    best_other_HQ = np.maximum(other_Q, remembered_other_Q - _HANDICAPS_H[:, None])
    seen_HQ = np.maximum(own_score_Q, queries.remembered_Q - _HANDICAPS_H[:, None]) > best_other_HQ
    seen_H, held_out_H = seen_HQ[:, seen_Q].sum(axis=1), (own_score_Q > best_other_HQ).sum(axis=1)
    right_Q = own_score_Q > other_Q
    seen, held_out = right_Q[seen_Q].sum(), right_Q.sum()
    safe_H = held_out_H >= held_out - held_out // _RIGHT_PER_LOSS
    helpful = [
        each for each in range(1, len(_HANDICAPS_H)) if seen_H[each] > seen and safe_H[each - 1 : each + 1].all()
    ]
    if not helpful:
        return None
    seen_share_H, held_out_share_H = seen_H / seen_Q.sum(), held_out_H / len(own_Q)
    harmonic_H = seen_share_H * held_out_share_H / (seen_share_H + held_out_share_H + 1e-12)
    chosen = max(helpful, key=lambda each: (harmonic_H[each], seen_H[each], each))  # of equals the largest
    return (
        float(_HANDICAPS_H[chosen]),
        _gain(int(seen_Q.sum()), int(seen), int(seen_H[chosen])),
        _gain(len(own_Q), int(held_out), int(held_out_H[chosen])),
    )


def _gain(queries: int, before: int, after: int) -> Gain:
    return Gain(queries=queries, before=round(100 * before / queries, 2), after=round(100 * after / queries, 2))


def _read_pictures(
    path: Path, config: ExportConfig, model: ExportModel, images: Embeddings, store: EntityStore,
    embeddings: QueryEmbeddings, reject: Reject,
) -> Iterator[tuple[Pair, int, QueryImage]]:  # fmt: skip
    """Yield the pairs whose entity has an embedding, with its row and the pixels of the picture, or its embedding."""
    find = cache(lambda entity_id: row_of(entity_id, store))

    def labelled() -> Iterator[tuple[Pair, int]]:
        for pair in read_pairs(path, config.image_root, embeddings=True):
            if isinstance(pair, Rejected):
                reject(pair)
            elif (row := find(pair.entity_id)) < 0:
                reject(_rejected(pair, f"entity_id {pair.entity_id} is not in the catalog"))
            elif not len(images.positions_of(row)):
                reject(_rejected(pair, f"entity {pair.entity_id} has no usable image in the catalog; add one"))
            else:
                yield pair, row

    pairs, same = tee(labelled())
    jobs = (ImageJob(images=[] if pair.embedding else [pair.image.image], text_hash=b"") for pair, _ in same)
    workers = config.workers or default_workers()
    with DecodePool(ImageReader(), model.image_encoder.preprocessing, thumbnail_px=0, workers=workers) as pool:
        for (pair, row), picture in zip(pairs, pool.map(jobs), strict=True):
            for _, reason in picture.failures:
                reject(_rejected(pair, reason))
            for pixels_HW3 in picture.pixels:
                yield pair, row, pixels_HW3
            if pair.embedding is not None:
                try:
                    embedding_D = embeddings.read(pair.embedding)
                except BadParameter as error:
                    reject(_rejected(pair, error.detail))
                else:
                    yield pair, row, embedding_D


def _rejected(pair: Pair, reason: str) -> Rejected:
    return Rejected(line=pair.image.line, reason=reason, record=pair.image.record)
