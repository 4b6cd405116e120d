"""The image encoder in int8 beside the float one, and what that costs, measured on what the catalog or the user gives.

Shapes: B batch, N images, D embedding width, H = W = size_px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from catalog.images import ImageReader, UnusableImage
from core.errors import EncoderSpecError, TooLarge, UndecodableImage, UserError
from core.jsonl import read_jsonl
from core.runtime import onnxruntime
from export.calibrate import read_queries, row_of
from export.config import ExportConfig
from export.decode import MAX_PIXELS
from export.engine import image_reader
from export.onnx_export import INPUT, OUTPUTS
from export.quantise import quantise
from export.sample import CatalogImages, Reservoir
from imaging import Preprocessing, load_pixels, normalise
from index.manifest import IMAGE_ENCODER_FILE, INT8_ENCODER_FILE, Int8Entry
from index.search import EntityIndex
from index.store import EntityStore
from model.checkpoint import Checkpoint

MIN_MEAN_COSINE = 0.9  # below it an encoder has not survived being quantised
_QUERIES = 1000  # judged on, at most
_BATCH = 32

Labelled = tuple[int, npt.NDArray[np.uint8]]  # the right entity's row, or -1, and pixels [H, W, 3]


def add_int8(
    config: ExportConfig,
    checkpoint: Checkpoint,
    bundle: Path,
    sample: Sequence[CatalogImages],
    index: EntityIndex,
    store: EntityStore,
) -> Int8Entry:
    """Write `image_encoder.int8.onnx` into a bundle that has its encoder, index and store, and measure what it costs.

    Ranges are taken from every other image of the sample. Raises `UserError` where the catalog has no image to take
    them from, `EncoderSpecError` where too little is left of the encoder.
    """
    preprocessing = checkpoint.image_encoder.preprocessing
    images = list(catalog_images(image_reader(config), preprocessing, sample))
    if not images:
        raise UserError("--int8 needs images of the catalog, and none can be used; go on with --resume, without --int8")
    calibration = images[::2]
    source, target = bundle / IMAGE_ENCODER_FILE, bundle / INT8_ENCODER_FILE
    judged_on, judged = "catalog images", images[1::2] or images
    if config.validation is not None and (queries := _queries(config.validation, preprocessing, store)):
        judged_on, judged = "validation queries", queries
    total = len(calibration) + 2 * len(judged)  # ranges from these, both files over those
    with tqdm(desc="int8", unit="image", total=total, disable=not config.progress) as bar:
        pixels_BHW3 = np.stack([pixels for _, pixels in calibration])
        quantise(source, target, pixels_BHW3, preprocessing, input_name=INPUT, on_images=bar.update)
        cost = measure_cost(source, target, judged, preprocessing, index, on_images=bar.update)
    if not cost["mean_cosine"] >= MIN_MEAN_COSINE:
        raise EncoderSpecError(
            f"the encoder does not bear int8: mean cosine {cost['mean_cosine']:.3f} to its own embeddings, "
            f"{MIN_MEAN_COSINE} is wanted; go on with --resume, without --int8"
        )
    return Int8Entry(
        file=INT8_ENCODER_FILE, calibrated_on=len(calibration), judged_on=judged_on, images=len(judged), **cost
    )


def measure_cost(
    source: Path,
    target: Path,
    judged: Sequence[Labelled],
    preprocessing: Preprocessing,
    index: EntityIndex,
    *,
    on_images: Callable[[int], object] = lambda images: None,
) -> dict[str, float]:
    """What the file `target` answers against `source`: cosines of embeddings, and the best entities, in percent.

    `on_images` is told how many images a file has encoded, batch by batch.
    """
    own_N = np.array([row for row, _ in judged])
    float_ND, int8_ND = (_encode(file, judged, preprocessing, on_images) for file in (source, target))
    cosines_N = (float_ND * int8_ND).sum(axis=1)
    float_N, int8_N = (index.search(embeddings_ND, 1)[0][:, 0] for embeddings_ND in (float_ND, int8_ND))
    return {
        "min_cosine": round(float(cosines_N.min()), 6),
        "mean_cosine": round(float(cosines_N.mean()), 6),
        "same_top_1": _percent(float_N == int8_N),
        "top_1_float": _percent(float_N == own_N),
        "top_1_int8": _percent(int8_N == own_N),
    }


def catalog_images(
    reader: ImageReader, preprocessing: Preprocessing, sample: Sequence[CatalogImages]
) -> Iterator[Labelled]:
    """The first usable image of each sampled entity. The others were told of when they were to be embedded."""
    for entity in sample:
        for image in entity.images:
            try:
                pixels_HW3 = load_pixels(reader.read(image), preprocessing, max_pixels=MAX_PIXELS)
            except (UnusableImage, UndecodableImage, TooLarge):
                continue
            yield entity.row, pixels_HW3
            break


def _queries(path: Path, preprocessing: Preprocessing, store: EntityStore) -> list[Labelled]:
    lines: Reservoir[int] = Reservoir(_QUERIES)
    for item in read_jsonl(path):
        if isinstance(item, tuple):
            lines.add(item[0])
    queries = read_queries(path, preprocessing, [], lines=frozenset(lines.items))
    return [(row_of(query.entity_id, store), query.pixels_HW3) for query in queries]


def _encode(
    path: Path, images: Sequence[Labelled], preprocessing: Preprocessing, on_images: Callable[[int], object]
) -> npt.NDArray[np.float32]:
    """Embeddings [N, D] as a file gives them, L2-normalised."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pending, embeddings = iter(images), []
    while batch := list(islice(pending, _BATCH)):
        pixels_BHW3 = np.stack([pixels_HW3 for _, pixels_HW3 in batch])
        embeddings += session.run([OUTPUTS[1]], {INPUT: normalise(pixels_BHW3, preprocessing)})
        on_images(len(batch))
    all_ND: npt.NDArray[np.float32] = np.concatenate(embeddings)
    all_ND /= np.linalg.norm(all_ND, axis=1, keepdims=True)
    return all_ND


def _percent(hits_N: npt.NDArray[np.bool_]) -> float:
    return round(100 * float(hits_N.mean()), 2)
