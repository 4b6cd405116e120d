"""Accuracy of an image encoder alone, without adaptor and text: `python -m demo.reference --image-encoder SPEC`.

It finds the nearest drawing in the catalog for each query. `demo.train_tiny` validates with it.

Shapes: N drawings of the catalog, Q queries, D embedding width.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from demo.build import CATALOG_ROLES, build_option, read_drawings
from imaging import load_pixels
from model.data import Pair, read_pairs
from model.encoders import ImageEncoder, ImageFeatures, open_image_encoder
from model.validation import Accuracy, measure

_BATCH = 64


def encode_files(encoder: ImageEncoder, paths: Sequence[Path], *, batch_size: int) -> Iterator[ImageFeatures]:
    """Yield an encoder's output for each batch of image files."""
    for start in tqdm(range(0, len(paths), batch_size), desc="images", unit="batch", leave=False):
        batch = paths[start : start + batch_size]
        pixels = [load_pixels(path.read_bytes(), encoder.preprocessing) for path in batch]
        yield encoder.encode(np.stack(pixels))


def labelled_pairs(path: Path) -> list[Pair]:
    """Return the pairs of a file of Symbols, all of which are valid."""
    return [item for item in read_pairs(path) if isinstance(item, Pair)]


def embed(encoder: ImageEncoder, paths: Sequence[Path]) -> torch.Tensor:
    """Return the L2-normalised embeddings `[N, D]` of image files."""
    batches = encode_files(encoder, paths, batch_size=_BATCH)
    return torch.cat([features.image_embedding_BD.cpu() for features in batches])


def evaluate_encoder(encoder: ImageEncoder, build: Path, part: str) -> dict[str, Accuracy]:
    """Return an encoder's accuracy alone on the queries of `part` (val or test), clean and photographed."""
    catalog = [drawing for drawing in read_drawings(build) if drawing.role in CATALOG_ROLES]
    owner_N = np.array([drawing.entity_id for drawing in catalog])
    catalog_ND = embed(encoder, [build / drawing.image for drawing in catalog])
    accuracies = {}
    for view in ("clean", "photo"):
        pairs = labelled_pairs(build / f"queries_{part}_{view}.jsonl")
        nearest_Q = (embed(encoder, [pair.image.path for pair in pairs]) @ catalog_ND.T).argmax(dim=1).numpy()
        correct_Q = owner_N[nearest_Q] == [pair.entity_id for pair in pairs]
        accuracies[view] = measure(correct_Q, [pair.seen for pair in pairs])
    return accuracies


@click.command()
@click.option("--image-encoder", default="tiny", show_default=True, help="tiny, onnx:PATH or hf:ID_OR_PATH.")
@build_option
def main(image_encoder: str, build: Path) -> None:
    """Measure an image encoder alone on the test queries, clean and photographed."""
    accuracies = evaluate_encoder(open_image_encoder(image_encoder), build, "test")
    click.echo(json.dumps({view: asdict(accuracy) for view, accuracy in accuracies.items()}, indent=1))


if __name__ == "__main__":
    main()
