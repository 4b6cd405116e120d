"""Confidence fitted on validation queries: how often a best prediction of some score was the right one.

Shapes: B batch, H = W = size_px, D embedding width, N queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from catalog import is_url
from core.errors import TooLarge, UndecodableImage
from core.jsonl import Rejected, read_jsonl
from export.embed import MAX_PIXELS, UnusableImage, read_image
from imaging import load_pixels
from index.calibration import Calibration, fit_calibration
from index.search import EntityIndex
from index.store import EntityStore
from model.encoders import ImageEncoder


@dataclass(frozen=True, kw_only=True)
class _Query:
    entity_id: str
    pixels_HW3: npt.NDArray[np.uint8]


def calibrate(
    queries: Path, encoder: ImageEncoder, index: EntityIndex, store: EntityStore, *, batch_size: int
) -> tuple[Calibration, list[Rejected]]:
    """Answer the queries and fit a calibration to their best scores. An entity that is not in the store is never right.

    Returns the queries that could not be used, too. Raises `CatalogError` if the file cannot be read, `UserError` if
    nothing can be fitted.
    """
    rejected: list[Rejected] = []
    scores: list[float] = []
    correct: list[bool] = []
    pending = _read_queries(queries, encoder, rejected)
    while batch := list(islice(pending, batch_size)):
        pixels_BHW3 = np.stack([query.pixels_HW3 for query in batch])
        embeddings_BD = encoder.encode(pixels_BHW3).image_embedding_BD.cpu().numpy()
        rows_B1, scores_B1 = index.search(embeddings_BD, 1)
        best = store.by_rows(rows_B1[:, 0].tolist())
        scores += scores_B1[:, 0].tolist()
        correct += [entity.entity_id == query.entity_id for entity, query in zip(best, batch, strict=True)]
    return fit_calibration(np.array(scores), np.array(correct, bool)), rejected


def _read_queries(path: Path, encoder: ImageEncoder, rejected: list[Rejected]) -> Iterator[_Query]:
    for item in read_jsonl(path):
        if isinstance(item, Rejected):
            rejected.append(Rejected(line=item.line, reason=f"{path.name}: {item.reason}", record=item.record))
            continue
        line, row = item
        image, entity_id = row.get("image"), row.get("entity_id")
        try:
            if not isinstance(image, str) or not isinstance(entity_id, str):
                raise UnusableImage("`image` and `entity_id` must be strings")
            data = read_image(image if is_url(image) else str(path.parent / image))
            pixels_HW3 = load_pixels(data, encoder.preprocessing, max_pixels=MAX_PIXELS)
        except (UnusableImage, UndecodableImage, TooLarge) as error:
            rejected.append(Rejected(line=line, reason=f"{path.name}: {error}", record=str(row)[:500]))
            continue
        yield _Query(entity_id=entity_id, pixels_HW3=pixels_HW3)
