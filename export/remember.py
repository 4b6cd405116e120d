"""Keep labelled pictures as remembered vectors (`--remember`), with a handicap chosen on the same pictures.

An entity's remembered vector is the normalised mean of its pictures' query embeddings. The handicap has the best
harmonic mean of two accuracies:

- seen: each picture of an entity with several, left out of its entity's vector;
- held out: each picture, with its entity's whole vector left out while all others stay. Memory can only lose these.
  The handicap and the next smaller one must lose none (of 500 or more that are found, at most one in 500).

If no such handicap finds more seen pictures, nothing is remembered. A checkpoint that was trained on the same pictures
finds most of them anyway, so `seen` underestimates what new pictures of these entities gain.

Shapes: M remembered entities, Q queries, H handicaps, D embedding width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, tee
from pathlib import Path

import numpy as np
from tqdm import tqdm

from catalog.images import ImageReader
from core.arrays import Float16Array, Float32Array, Float64Array, Int64Array, Pixels
from core.errors import UserError
from core.jsonl import Rejected, RejectLog
from core.reservoir import Reservoir
from export.calibrate import hash_pixels, row_of, search_embeddings
from export.config import ExportConfig
from export.decode import DecodePool, ImageJob, default_workers
from export.model import ExportModel, ImageModel
from index.embeddings import Embeddings, normalised, write_shard
from index.manifest import Gain, RememberedEntry
from index.remembered import Remembered
from index.search import EntityIndex
from index.store import EntityStore
from model.data import Pair, read_pairs

_HANDICAPS_H = np.arange(21) / 50  # 0 to 0.4
_MAX_QUERIES = 4096
_RIGHT_PER_LOSS = 500  # held-out pictures; without it, one outlier among thousands would decide
_SAME_IMAGE = 0.9999  # cosine


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
    validation: Collection[bytes],
) -> tuple[Remembered, RememberedEntry] | None:
    """Write the remembered vectors of the pairs at `path` into the new `folder`, unless no handicap helps.

    Pictures that cannot be used are logged. `validation` has the `hash_pixels` of the validation queries. Raise
    `UserError` if no picture can be used, or if some are validation queries, too.
    """

    def reject(item: Rejected) -> None:
        log.add(replace(item, reason=f"{path.name}: {item.reason}"))

    pictures = LabelledPictures()
    seen: set[tuple[int, bytes]] = set()
    shared = 0
    decoded = _decoded(_labelled(path, config, images, store, reject), config, model, reject)
    labelled = tqdm(decoded, desc="remember", unit="picture", disable=not config.progress)
    while batch := list(islice(labelled, config.batch_size)):
        embeddings_BD = model.embed_queries(np.stack([pixels_HW3 for _, _, pixels_HW3 in batch]))
        for (pair, row, pixels_HW3), embedding_D in zip(batch, embeddings_BD, strict=True):
            digest = hash_pixels(pixels_HW3)
            shared += digest in validation
            # Without a checkpoint, the catalog's images are embedded like queries.
            if isinstance(model, ImageModel) and np.any(images.images_of(row) @ embedding_D > _SAME_IMAGE):
                reject(_rejected(pair, "the catalog has this image of the entity already"))
            elif (row, digest) not in seen:
                seen.add((row, digest))
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
    if (chosen := choose_handicap(pictures, vectors, config, index)) is None:
        return None
    folder.mkdir()
    write_shard(folder, 0, rows_M, vectors_MD)
    return Remembered(vectors, chosen.handicap), chosen


def choose_handicap(
    pictures: LabelledPictures, vectors: Embeddings, config: ExportConfig, index: EntityIndex
) -> RememberedEntry | None:
    """Return the best handicap and what it does, or None if none helps. `index` remembers nothing yet."""
    own_Q = np.array([row for row, _ in pictures.sample.items], np.int64)
    queries_QD = np.stack([embedding_D for _, embedding_D in pictures.sample.items])
    count_Q = np.array([pictures.counts[row] for row in own_Q.tolist()])
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
    others_QD = np.stack([pictures.sums[row] for row in own_Q.tolist()]) - queries_QD
    left_out_Q = (normalised(others_QD.astype(np.float32)) * queries_QD).sum(axis=1)

    several_Q = count_Q > 1
    best_other_HQ = np.maximum(other_Q, remembered_other_Q - _HANDICAPS_H[:, None])
    seen_HQ = np.maximum(own_score_Q, left_out_Q - _HANDICAPS_H[:, None]) > best_other_HQ
    seen_H, held_out_H = seen_HQ[:, several_Q].sum(axis=1), (own_score_Q > best_other_HQ).sum(axis=1)
    right_Q = own_score_Q > other_Q
    seen, held_out = right_Q[several_Q].sum(), right_Q.sum()
    safe_H = held_out_H >= held_out - held_out // _RIGHT_PER_LOSS
    helpful = [
        each for each in range(1, len(_HANDICAPS_H)) if seen_H[each] > seen and safe_H[each - 1 : each + 1].all()
    ]
    if not helpful:
        return None
    seen_share_H, held_out_share_H = seen_H / several_Q.sum(), held_out_H / len(own_Q)
    harmonic_H = seen_share_H * held_out_share_H / (seen_share_H + held_out_share_H + 1e-12)
    chosen = max(helpful, key=lambda each: (harmonic_H[each], seen_H[each], each))  # of equals the largest
    return RememberedEntry(
        entities=len(vectors),
        pictures=pictures.counts.total(),
        handicap=float(_HANDICAPS_H[chosen]),
        seen=_gain(int(several_Q.sum()), int(seen), int(seen_H[chosen])),
        held_out=_gain(len(own_Q), int(held_out), int(held_out_H[chosen])),
    )


def _gain(queries: int, before: int, after: int) -> Gain:
    return Gain(queries=queries, before=round(100 * before / queries, 2), after=round(100 * after / queries, 2))


def _labelled(
    path: Path, config: ExportConfig, images: Embeddings, store: EntityStore, reject: Callable[[Rejected], None]
) -> Iterator[tuple[Pair, int]]:
    """Yield the pairs whose entity has an embedding, with its row."""
    find = cache(lambda entity_id: row_of(entity_id, store))
    for pair in read_pairs(path, config.image_root):
        if isinstance(pair, Rejected):
            reject(pair)
        elif (row := find(pair.entity_id)) < 0:
            reject(_rejected(pair, f"entity_id {pair.entity_id} is not in the catalog"))
        elif not len(images.positions_of(row)):
            reject(_rejected(pair, f"entity {pair.entity_id} has no usable image in the catalog; add one"))
        else:
            yield pair, row


def _decoded(
    labelled: Iterator[tuple[Pair, int]], config: ExportConfig, model: ExportModel, reject: Callable[[Rejected], None]
) -> Iterator[tuple[Pair, int, Pixels]]:
    """Yield the pairs whose picture can be decoded, with its pixels."""
    labelled, same = tee(labelled)
    jobs = (ImageJob(images=[pair.image.image], text_hash=b"") for pair, _ in same)
    workers = config.workers or default_workers()
    with DecodePool(ImageReader(), model.image_encoder.preprocessing, thumbnail_px=0, workers=workers) as pool:
        for (pair, row), picture in zip(labelled, pool.map(jobs), strict=True):
            for _, reason in picture.failures:
                reject(_rejected(pair, reason))
            for pixels_HW3 in picture.pixels:
                yield pair, row, pixels_HW3


def _rejected(pair: Pair, reason: str) -> Rejected:
    return Rejected(line=pair.image.line, reason=reason, record=pair.image.record)
