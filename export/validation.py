"""Confidence fitted on validation queries, and on the same queries with their own entity left out of the catalog.

Shapes: B batch, H = W = size_px, D embedding width, N queries, K best entities, F those looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from catalog import is_url
from catalog.images import LocalImages, UnusableImage
from core.errors import TooLarge, UndecodableImage, UnknownEntity
from core.jsonl import Rejected, read_jsonl
from export.decode import MAX_PIXELS
from export.outliers import outlier_images
from imaging import Preprocessing, load_pixels
from index.calibration import CANDIDATES, Asked, Calibration, fit_calibration, with_familiarity
from index.search import EntityIndex
from index.store import EntityStore
from model.checkpoint import Checkpoint

# Images that show nothing, to fit to: one for so many queries, within bounds.
_QUERIES_AN_OUTLIER, _LEAST_OUTLIERS, _MOST_OUTLIERS = 10, 64, 512


@dataclass(frozen=True, kw_only=True)
class Query:
    """A labelled query: `entity_id` is the right answer."""

    entity_id: str
    pixels_HW3: npt.NDArray[np.uint8]


def calibrate(
    queries: Path,
    checkpoint: Checkpoint,
    index: EntityIndex,
    store: EntityStore,
    *,
    batch_size: int,
    progress: bool = False,
) -> tuple[Calibration, list[Rejected]]:
    """Answer the queries, and images that show nothing, and fit a calibration to their best scores and embeddings.

    Queries for entities that the store does not hold take part as what they are: unknown, never right. Returns the
    queries that could not be used, too. Raises `CatalogError` if the file cannot be read, `UserError` if nothing can
    be fitted.
    """
    rejected: list[Rejected] = []
    entity_ids: list[str] = []
    preprocessing = checkpoint.image_encoder.preprocessing

    def decoded() -> Iterator[npt.NDArray[np.uint8]]:
        for query in read_queries(queries, preprocessing, rejected):
            entity_ids.append(query.entity_id)
            yield query.pixels_HW3

    asking = tqdm(decoded(), desc="validation", unit="query", disable=not progress)
    rows_NF, asked = _ask(iter(asking), checkpoint, index, batch_size)
    own_N = np.array([row_of(entity_id, store) for entity_id in entity_ids], np.int64)  # -1: not in the store
    right_NF = (rows_NF == own_N[:, None]) & (rows_NF >= 0)
    without_NK = _without(asked.scores_NK, right_NF)
    best = replace(asked, scores_NK=asked.scores_NK[:, :CANDIDATES])
    calibration = fit_calibration(best.scores_NK, right_NF[:, :CANDIDATES], own_N >= 0, without_NK)
    count = min(max(len(own_N) // _QUERIES_AN_OUTLIER, _LEAST_OUTLIERS), _MOST_OUTLIERS)
    _, outliers = _ask(outlier_images(count, preprocessing.size_px), checkpoint, index, batch_size)
    calibration = with_familiarity(
        calibration,
        best,
        own_N >= 0,
        without_NK,
        group_N=np.unique(entity_ids, return_inverse=True)[1],
        outliers=replace(outliers, scores_NK=outliers.scores_NK[:, :CANDIDATES]),
        progress=progress,
    )
    return calibration, rejected


def _ask(
    images: Iterator[npt.NDArray[np.uint8]], checkpoint: Checkpoint, index: EntityIndex, batch_size: int
) -> tuple[npt.NDArray[np.int64], Asked]:
    """The best rows `[N, F]`, one more than a calibration looks at, and their scores with the queries' embeddings."""
    rows = [np.zeros((0, CANDIDATES + 1), np.int64)]
    scores = [np.zeros((0, CANDIDATES + 1))]
    embeddings = [np.zeros((0, checkpoint.image_encoder.embedding_dim), np.float32)]
    while batch := list(islice(images, batch_size)):
        queries_BD = checkpoint.embed_queries(np.stack(batch))
        rows_BF, scores_BF = index.search(queries_BD, CANDIDATES + 1)
        rows.append(rows_BF)
        scores.append(np.where(rows_BF < 0, np.nan, scores_BF.astype(np.float64)))
        embeddings.append(queries_BD)
    return np.concatenate(rows), Asked(scores_NK=np.concatenate(scores), embeddings_ND=np.concatenate(embeddings))


def _without(scores_NF: npt.NDArray[np.float64], right_NF: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The best scores `[N, K]` that are left when the right entity is taken away."""
    left = [scores_F[~right_F][:CANDIDATES] for scores_F, right_F in zip(scores_NF, right_NF, strict=True)]
    return np.array(left, np.float64).reshape(-1, CANDIDATES)


def row_of(entity_id: str, store: EntityStore) -> int:
    try:
        return store.get(entity_id).row
    except UnknownEntity:
        return -1


def read_queries(
    path: Path, preprocessing: Preprocessing, rejected: list[Rejected], *, lines: Collection[int] | None = None
) -> Iterator[Query]:
    """The queries of a file, decoded, or only those on some lines; what cannot be used goes to `rejected`."""
    for item in read_jsonl(path):
        if isinstance(item, Rejected):
            rejected.append(Rejected(line=item.line, reason=f"{path.name}: {item.reason}", record=item.record))
            continue
        line, row = item
        if lines is not None and line not in lines:
            continue
        image, entity_id = row.get("image"), row.get("entity_id")
        try:
            if not isinstance(image, str) or not isinstance(entity_id, str):
                raise UnusableImage("`image` and `entity_id` must be strings")
            data = LocalImages().read(image if is_url(image) else str(path.parent / image))
            pixels_HW3 = load_pixels(data, preprocessing, max_pixels=MAX_PIXELS)
        except (UnusableImage, UndecodableImage, TooLarge) as error:
            rejected.append(Rejected(line=line, reason=f"{path.name}: {error}", record=str(row)[:500]))
            continue
        yield Query(entity_id=entity_id, pixels_HW3=pixels_HW3)
