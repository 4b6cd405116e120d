"""Accuracy of an image encoder alone, without adaptor and text: `python -m demo.reference --image-encoder SPEC`.

It finds the nearest drawing in the catalog for each of the demo's test queries.

Shapes: B images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from core.jsonl import Rejected
from demo.build import CATALOG_ROLES, build_option, read_drawings
from evaluation.metrics import RECALL_AT, AnsweredQuery, as_table, rank_of, summarise
from imaging import load_pixels
from model.data import read_pairs
from model.encoders import ImageEncoder, open_image_encoder

_BATCH = 64
_MAX_PIXELS = 64_000_000


def embed(encoder: ImageEncoder, paths: Sequence[Path]) -> torch.Tensor:
    """Return the L2-normalised embeddings `[B, D]` of image files."""
    embeddings = []
    for start in tqdm(range(0, len(paths), _BATCH), desc="images", unit="batch"):
        batch = paths[start : start + _BATCH]
        pixels = [load_pixels(path.read_bytes(), encoder.preprocessing, max_pixels=_MAX_PIXELS) for path in batch]
        embeddings.append(encoder.encode(np.stack(pixels)).image_embedding_BD.cpu())
    return F.normalize(torch.cat(embeddings), dim=1)


def nearest_entities(similarity: torch.Tensor, entity_ids: Sequence[str], count: int) -> list[str]:
    """Return the `count` best entities of one query, each by its best drawing."""
    found: dict[str, None] = {}
    for position in similarity.argsort(descending=True).tolist():
        found.setdefault(entity_ids[position])
        if len(found) == count:
            break
    return list(found)


@click.command()
@click.option("--image-encoder", default="tiny", show_default=True, help="tiny, onnx:PATH or hf:ID_OR_PATH.")
@build_option
def main(image_encoder: str, build: Path) -> None:
    """Measure an image encoder alone on the test queries, clean and photographed."""
    encoder = open_image_encoder(image_encoder)
    catalog = [drawing for drawing in read_drawings(build) if drawing.role in CATALOG_ROLES]
    entity_ids = [drawing.entity_id for drawing in catalog]
    catalog_ND = embed(encoder, [build / drawing.image for drawing in catalog])
    for view in ("clean", "photo"):
        queries = [item for item in read_pairs(build / f"queries_test_{view}.jsonl") if not isinstance(item, Rejected)]
        answered = []
        for query, embedding_D in zip(queries, embed(encoder, [q.image.path for q in queries]), strict=True):
            found = nearest_entities(catalog_ND @ embedding_D, entity_ids, max(RECALL_AT))
            rank = rank_of(query.entity_id, found)
            answered.append(AnsweredQuery(data_split=query.data_split, seen=query.seen, rank=rank))
        click.echo(as_table(summarise(answered, rejected=0)))


if __name__ == "__main__":
    main()
