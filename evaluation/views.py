"""Accuracy and calibration of one to four photographs of one thing: `python -m evaluation.views --photos FOLDER`.

The folder is that of `evaluation.photographs`. Two catalogs are searched, exactly: the entities with five photographs,
and all. Photograph 0 is the entity's image, and 1 to 4 are the queries: alone, and combined in every set of two, three
and four. That gives top-1.

Confidence is fitted to one half of the entities, as an export with validation queries does, and tested on the other.
Half of the tested entities are left out of the catalog. 95 entities give too few sets of four to measure an error of
0.05, so halves are drawn several times, each time with another photograph of each as the entity's image. Answers are
pooled over the draws.

Shapes: N queries, E entities of a catalog, F best ones, D embedding width, S sets, V photographs of a set.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from core.arrays import Float32Array, Pixels
from core.files import atomic_write_bytes
from core.runtime import describe_run
from core.statistics import wilson_interval
from evaluation.metrics import calibration_error, reliability
from evaluation.photographs import PHOTOGRAPHS, Photographs
from export.calibrate import add_open_set_model, fit_softmax
from export.config import ExportConfig
from export.decode import image_decoder
from export.model import ImageModel
from export.open_set import outlier_images
from export.queries import LabelledSearch, embed_images
from export.views import MAX_FITTED, combine_sets, fit_views, sets_of
from index.calibration import CANDIDATES, Calibration, background
from model.encoders import open_image_encoder
from wikiclip.cli import run

_OUTLIERS = 64
_BINS = 10
_REDRAWN = 20

Embeddings = Mapping[str, Float32Array]  # of each entity's photographs


class Search:
    """A catalog with one image of each entity."""

    def __init__(self, images: Mapping[str, Float32Array]) -> None:
        self._rows = {entity_id: row for row, entity_id in enumerate(images)}
        self._vectors_ED = np.stack(list(images.values()))

    def __call__(self, queries_ND: Float32Array, entity_ids: Sequence[str]) -> LabelledSearch:
        scores_NE = (queries_ND @ self._vectors_ED.T).astype(np.float64)
        rows_NF = np.argsort(-scores_NE, axis=1, kind="stable")[:, : CANDIDATES + 1]
        return LabelledSearch(
            own_N=np.array([self._rows.get(entity_id, -1) for entity_id in entity_ids], np.int64),
            group_N=np.unique(entity_ids, return_inverse=True)[1],
            rows_NF=rows_NF,
            scores_NF=np.take_along_axis(scores_NE, rows_NF, axis=1),
            embeddings_ND=queries_ND,
        )

    def sets(self, photographs: Mapping[str, Float32Array], views: int) -> LabelledSearch:
        """Search for every set of `views` of each entity's photographs."""
        entity_ids = [entity_id for entity_id, each_ND in photographs.items() for _ in each_ND]
        embeddings_ND = np.concatenate(list(photographs.values()))
        if views == 1:
            return self(embeddings_ND, entity_ids)
        sets_SV = sets_of(np.unique(entity_ids, return_inverse=True)[1], views)
        return self(combine_sets(embeddings_ND, sets_SV), [entity_ids[first] for first in sets_SV[:, 0]])


def top_1(embeddings: Embeddings, catalog: Sequence[str]) -> dict[int, tuple[float, tuple[float, float]]]:
    """Return the accuracy in percent by the number of photographs, with Wilson's interval.

    Sets that share photographs count as the number of disjoint ones.
    """
    queries = _photographs(embeddings, [each for each in catalog if len(embeddings[each]) >= PHOTOGRAPHS])
    search = Search({entity_id: embeddings[entity_id][0] for entity_id in catalog})
    accuracies = {}
    for views in range(1, MAX_FITTED + 1):
        right = float(search.sets(queries, views).right[:, 0].mean())
        disjoint = len(queries) * ((PHOTOGRAPHS - 1) // views)
        low, high = wilson_interval(right * disjoint, disjoint)
        accuracies[views] = 100 * right, (100 * low, 100 * high)
    return accuracies


def calibration_errors(
    embeddings: Embeddings, catalog: Sequence[str], outliers_ND: Float32Array, draws: int
) -> dict[int, tuple[tuple[float, float], tuple[float, float]]]:
    """Return the expected calibration errors of confidence and of `known` by the number of photographs.

    After each error comes what it would be with perfect probabilities of as many independent answers. Those of one
    entity are not independent, so that is the least that can be measured.
    """
    queried = [each for each in catalog if len(embeddings[each]) >= PHOTOGRAPHS]
    judged: dict[tuple[int, str], list[tuple[float, bool]]] = defaultdict(list)
    for draw in tqdm(range(draws), unit="draw", disable=None):
        rng = np.random.default_rng(draw)
        drawn = {each: rng.permutation(embeddings[each][:PHOTOGRAPHS]) for each in queried}
        shuffled = rng.permutation(queried).tolist()
        halves = shuffled[::2], shuffled[1::2]
        for fitted_on, tested_on in (halves, halves[::-1]):
            unknown = set(tested_on[::2])
            search = Search({each: drawn.get(each, embeddings[each])[0] for each in catalog if each not in unknown})
            queries, tests = _photographs(drawn, fitted_on), _photographs(drawn, tested_on)
            outliers = search(outliers_ND, [""] * len(outliers_ND))
            single = search.sets(queries, 1)
            calibration = add_open_set_model(fit_softmax(single), single, outliers)
            calibration = fit_views(calibration, single, partial(search.sets, queries))
            for views in range(1, MAX_FITTED + 1):
                found = search.sets(tests, views)
                for right, is_known, (confidence, known) in zip(
                    found.right[:, 0].tolist(),
                    found.in_catalog.tolist(),
                    _judge(calibration, found, views),
                    strict=True,
                ):
                    judged[views, "known"].append((known, is_known))
                    if is_known:
                        judged[views, "confidence"].append((confidence, right))
    return {
        views: (_error(judged[views, "confidence"]), _error(judged[views, "known"]))
        for views in range(1, MAX_FITTED + 1)
    }


def _photographs(embeddings: Embeddings, entity_ids: Sequence[str]) -> dict[str, Float32Array]:
    return {each: embeddings[each][1:PHOTOGRAPHS] for each in entity_ids}


def _judge(calibration: Calibration, found: LabelledSearch, views: int) -> Iterator[tuple[float, float]]:
    """Yield the confidence of the best prediction, and `known`, of each query."""
    of_views = calibration.of_views(views)
    for scores, embedding_D in zip(found.scores.tolist(), found.embeddings_ND, strict=True):
        confidences, known = of_views.judge(scores, background(scores), embedding_D)
        yield confidences[0], known


def _error(judged: Sequence[tuple[float, bool]]) -> tuple[float, float]:
    """Return the calibration error, and what it would be on average if the probabilities were perfect."""
    probabilities, right = zip(*judged, strict=True)
    rng = np.random.default_rng(0)
    drawn = (rng.random(len(right)) < np.array(probabilities) for _ in range(_REDRAWN))
    perfect = np.mean([calibration_error(reliability(probabilities, each.tolist(), _BINS)) for each in drawn])
    return calibration_error(reliability(probabilities, right, _BINS)), float(perfect)


def embed_photographs(photographs: Photographs, spec: str) -> tuple[dict[str, Float32Array], Float32Array]:
    """Return the embeddings of each entity's photographs `[N, D]`, and those of images of nothing."""
    device = torch.device("cpu")
    model = ImageModel(image_encoder=open_image_encoder(spec, device=device), device=device)
    preprocessing = model.image_encoder.preprocessing
    config = ExportConfig(catalog=Path(), out=Path())
    numbers = {
        each.entity_id: PHOTOGRAPHS if each.entity_id in photographs.queried else 1
        for each in photographs.records.values()
    }

    def images() -> Iterator[Pixels]:
        for entity_id, count in numbers.items():
            for image in photographs.records[entity_id].images[:count]:
                yield image_decoder().load_pixels(Path(image).read_bytes(), preprocessing)

    shown = tqdm(images(), desc="encode", unit="photograph", total=sum(numbers.values()), disable=None)
    embeddings_ND = embed_images(shown, config, model)
    ends = np.cumsum(list(numbers.values()))[:-1]
    outliers_ND = embed_images(outlier_images(_OUTLIERS, preprocessing.size_px), config, model)
    return dict(zip(numbers, np.split(embeddings_ND, ends), strict=True)), outliers_ND


@click.command()
@click.option("--photos", required=True, type=click.Path(path_type=Path), help="Folder with entities.jsonl.")
@click.option(
    "--encoder", "specs", required=True, multiple=True, help="Image encoder, such as photo or onnx:FILE.onnx."
)
@click.option("--draws", default=10, show_default=True, type=click.IntRange(1), help="Halves of the entities to draw.")
@click.option("--out", type=click.Path(path_type=Path), help="Figures, JSON.")
def main(photos: Path, specs: tuple[str, ...], draws: int, out: Path | None) -> None:
    """Measure top-1, and the calibration errors of confidence and `known`, for one to four photographs."""
    photographs = Photographs(photos)
    described = describe_run({"draws": draws, "photographs": photographs.digest})
    figures: dict[str, dict[str, dict[str, Any]]] = {}  # by size of the catalog, number of photographs and encoder
    for spec in specs:
        encoder = Path(spec).name.removesuffix(".onnx")
        embeddings, outliers_ND = embed_photographs(photographs, spec)
        for catalog in (photographs.queried, list(photographs.records)):
            by_views = figures.setdefault(str(len(catalog)), {})
            errors = calibration_errors(embeddings, catalog, outliers_ND, draws)
            for views, (accuracy, interval) in top_1(embeddings, catalog).items():
                (confidence_error, confidence_of_perfect), (known_error, known_of_perfect) = errors[views]
                by_views.setdefault(str(views), {})[encoder] = {
                    "top_1": accuracy,
                    "interval": interval,
                    "confidence_error": confidence_error,
                    "confidence_error_of_perfect": confidence_of_perfect,
                    "known_error": known_error,
                    "known_error_of_perfect": known_of_perfect,
                }
    report = json.dumps({**described, "figures": figures}, indent=1)
    click.echo(report)
    if out is not None:
        atomic_write_bytes(out, report.encode())


if __name__ == "__main__":
    run(main, name="python -m evaluation.views")
