"""Confidence fitted on validation queries, and on the same queries with their own entity left out of the catalog.

Shapes: B batch, H = W = size_px, D embedding width, N queries, K best entities, F those looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from catalog import is_url
from catalog.images import LocalImages, UnusableImage
from core.errors import TooLarge, UndecodableImage, UnknownEntity
from core.jsonl import Rejected, read_jsonl
from export.decode import MAX_PIXELS
from imaging import Preprocessing, load_pixels
from index.calibration import CANDIDATES, Calibration, fit_calibration
from index.search import EntityIndex
from index.store import EntityStore
from model.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Query:
    """A labelled query: `entity_id` is the right answer."""

    entity_id: str
    pixels_HW3: npt.NDArray[np.uint8]


def calibrate(
    queries: Path, checkpoint: Checkpoint, index: EntityIndex, store: EntityStore, *, batch_size: int
) -> tuple[Calibration, list[Rejected]]:
    """Answer the queries and fit a calibration to their best scores.

    Queries for entities that the store does not hold take part as what they are: unknown, never right. Returns the
    queries that could not be used, too. Raises `CatalogError` if the file cannot be read, `UserError` if nothing can
    be fitted.
    """
    rejected: list[Rejected] = []
    own_rows: list[int] = []  # -1: the store does not hold that entity
    rows: list[npt.NDArray[np.int64]] = []
    scores: list[npt.NDArray[np.float32]] = []
    pending = read_queries(queries, checkpoint.image_encoder.preprocessing, rejected)
    while batch := list(islice(pending, batch_size)):
        pixels_BHW3 = np.stack([query.pixels_HW3 for query in batch])
        rows_BF, scores_BF = index.search(checkpoint.embed_queries(pixels_BHW3), CANDIDATES + 1)
        own_rows += [row_of(query.entity_id, store) for query in batch]
        rows += list(rows_BF)
        scores += list(scores_BF)
    rows_NF = np.array(rows, np.int64).reshape(-1, CANDIDATES + 1)
    scores_NF = np.array(scores, np.float64).reshape(-1, CANDIDATES + 1)
    scores_NF[rows_NF < 0] = np.nan
    own_N = np.array(own_rows, np.int64)
    right_NF = (rows_NF == own_N[:, None]) & (rows_NF >= 0)
    calibration = fit_calibration(
        scores_NF[:, :CANDIDATES], right_NF[:, :CANDIDATES], own_N >= 0, _without(scores_NF, right_NF)
    )
    return calibration, rejected


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
