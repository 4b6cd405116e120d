"""Accuracy of an image encoder alone, without adaptor and text: `python -m demo.reference --image-encoder SPEC`.

It finds the nearest drawing in the catalog for each query. `demo.train_tiny` validates with it.

Shapes: B images, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from core.jsonl import Rejected
from demo.build import CATALOG_ROLES, build_option, read_drawings
from evaluation.metrics import RECALL_AT, AnsweredQuery, Evaluation, as_table, rank_of, summarise
from imaging import load_pixels
from model.data import read_pairs
from model.encoders import ImageEncoder, open_image_encoder
from model.features import MAX_PIXELS

_BATCH = 64


def embed(encoder: ImageEncoder, paths: Sequence[Path]) -> torch.Tensor:
    """Return the L2-normalised embeddings `[B, D]` of image files."""
    embeddings = []
    for start in tqdm(range(0, len(paths), _BATCH), desc="images", unit="batch", leave=False):
        batch = paths[start : start + _BATCH]
        pixels = [load_pixels(path.read_bytes(), encoder.preprocessing, max_pixels=MAX_PIXELS) for path in batch]
        embeddings.append(encoder.encode(np.stack(pixels)).image_embedding_BD.cpu())
    return torch.cat(embeddings)


def nearest_entities(similarity: torch.Tensor, entity_ids: Sequence[str], count: int) -> list[str]:
    """Return the `count` best entities of one query, each by its best drawing."""
    found: dict[str, None] = {}
    for position in similarity.argsort(descending=True).tolist():
        found.setdefault(entity_ids[position])
        if len(found) == count:
            break
    return list(found)


def evaluate_encoder(encoder: ImageEncoder, build: Path, part: str) -> dict[str, Evaluation]:
    """Evaluate an encoder alone on the queries of `part` (val or test), clean and photographed."""
    catalog = [drawing for drawing in read_drawings(build) if drawing.role in CATALOG_ROLES]
    entity_ids = [drawing.entity_id for drawing in catalog]
    catalog_ND = embed(encoder, [build / drawing.image for drawing in catalog])
    evaluations = {}
    for view in ("clean", "photo"):
        pairs = [item for item in read_pairs(build / f"queries_{part}_{view}.jsonl") if not isinstance(item, Rejected)]
        answered = []
        for pair, embedding_D in zip(pairs, embed(encoder, [pair.image.path for pair in pairs]), strict=True):
            found = nearest_entities(catalog_ND @ embedding_D, entity_ids, max(RECALL_AT))
            rank = rank_of(pair.entity_id, found)
            answered.append(AnsweredQuery(data_split=pair.data_split, seen=pair.seen, rank=rank))
        evaluations[view] = summarise(answered, rejected=0)
    return evaluations


@click.command()
@click.option("--image-encoder", default="tiny", show_default=True, help="tiny, onnx:PATH or hf:ID_OR_PATH.")
@build_option
def main(image_encoder: str, build: Path) -> None:
    """Measure an image encoder alone on the test queries, clean and photographed."""
    for evaluation in evaluate_encoder(open_image_encoder(image_encoder), build, "test").values():
        click.echo(as_table(evaluation))


if __name__ == "__main__":
    main()
