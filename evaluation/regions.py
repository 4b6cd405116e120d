"""Accuracy of `regions=auto` on pages that show one to five things: `python -m evaluation.regions --bundle BUNDLE ...`.

A page shows queries of different entities on a texture or a photograph, without overlaps, each on 10 to 60 % of the
area. Recall is the share of the things whose entity is the best prediction of a region. Precision is the share of the
regions whose best prediction is an entity of the page. They are compared with the page as one query, of which as many
predictions count as there are things. The last row asks for the one thing of a page where it covers 10 to 30 %: the
best region's entity, or the page's where there is no region.
"""

from __future__ import annotations

import io
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from core.arrays import Float64Array
from core.errors import UserError
from core.files import atomic_write_bytes
from core.runtime import describe_run
from evaluation.metrics import ratio_interval, share_interval
from imaging import decode
from model.data import Pair, read_pairs
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Recognition, RecognizeOptions
from wikiclip.cli import run

MAX_THINGS = 5
SMALL = "1 on 10 to 30 %, top-1"  # the last figures
_SHAPES = ((640, 480), (480, 640), (640, 640))  # of pages, in pixels
_AREAS, _SMALL = (0.1, 0.6), (0.1, 0.3)  # of a thing, as a share of the page
_CROWDED = 0.75  # of the page at most, covered by things
_ATTEMPTS = 60


class Pages:
    """Draws pages from queries. Equal seeds give equal pages."""

    def __init__(self, queries: Sequence[tuple[str, Path]], backgrounds: Sequence[Path], seed: int) -> None:
        self._by_entity: dict[str, list[Path]] = defaultdict(list)
        for entity_id, path in queries:
            self._by_entity[entity_id].append(path)
        self._entity_ids = sorted(self._by_entity)
        self._backgrounds = backgrounds
        self._rng = np.random.default_rng(seed)

    def draw(self, things: int, areas: tuple[float, float]) -> tuple[Image.Image, list[str]]:
        """Return a page with so many things, and their entities."""
        while True:
            width, height = _SHAPES[self._rng.integers(len(_SHAPES))]
            entity_ids = self._rng.choice(self._entity_ids, things, replace=False).tolist()
            placed: list[tuple[tuple[int, int], Image.Image]] = []
            for entity_id in entity_ids:
                image = _read(self._pick(self._by_entity[entity_id]))
                share = self._rng.uniform(areas[0], min(areas[1], _CROWDED / things))
                scale = (share * width * height / (image.width * image.height)) ** 0.5
                image = image.resize((max(1, round(scale * image.width)), max(1, round(scale * image.height))))
                corner = self._place(image, placed, width, height)
                if corner is None:
                    break
                placed.append((corner, image))
            else:
                page = self._background(width, height)
                for corner, image in placed:
                    page.paste(image, corner)
                return page, entity_ids

    def _place(
        self, image: Image.Image, placed: Sequence[tuple[tuple[int, int], Image.Image]], width: int, height: int
    ) -> tuple[int, int] | None:
        """Return where the image overlaps no other, None if no such place was found."""
        if image.width > width or image.height > height:
            return None
        for _ in range(_ATTEMPTS):
            x, y = self._rng.integers((width - image.width + 1, height - image.height + 1)).tolist()
            if all(
                x + image.width <= left or left + other.width <= x or y + image.height <= top or top + other.height <= y
                for (left, top), other in placed
            ):
                return x, y
        return None

    def _background(self, width: int, height: int) -> Image.Image:
        if self._backgrounds and self._rng.random() < 0.5:
            image = _read(self._pick(self._backgrounds))
            scale = max(width / image.width, height / image.height)
            box = (0.0, 0.0, width / scale, height / scale)
            return image.resize((width, height), box=box)
        # Noise at several scales around a colour. Not `export.open_set.outlier_images`: `known` is fitted to those.
        values_HW3: Float64Array = np.zeros((height, width, 3)) + self._rng.uniform(40, 230, 3)
        strength = self._rng.choice((0.0, 10.0, 40.0))
        for octave in range(2, 8):
            noise = self._rng.normal(size=(2**octave, 2**octave, self._rng.choice((1, 3))))
            for channel in range(3):
                layer = Image.fromarray(noise[..., channel % noise.shape[2]].astype(np.float32))
                layer = layer.resize((width, height), Image.Resampling.BICUBIC)
                values_HW3[..., channel] += strength * np.asarray(layer)
        return Image.fromarray(np.clip(values_HW3, 0, 255).astype(np.uint8))

    def _pick(self, paths: Sequence[Path]) -> Path:
        return paths[int(self._rng.integers(len(paths)))]


def _read(path: Path) -> Image.Image:
    return decode(path.read_bytes())


def recognise(recognizer: Recognizer, page: Image.Image, options: RecognizeOptions) -> tuple[Recognition, float]:
    """Return the answer for a page, and how long it took in milliseconds."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    started_at = time.perf_counter()
    [answer] = recognizer.recognize_many([buffer.getvalue()], options)
    elapsed_ms = 1000 * (time.perf_counter() - started_at)
    if not isinstance(answer, Recognition):
        raise answer
    return answer, elapsed_ms


def measure(recognizer: Recognizer, pages: Pages, count: int, things: int, *, small: bool = False) -> dict[str, Any]:
    """Recognise `count` pages with so many things. Return shares in percent with their intervals, and median times.

    With `small`, only the first region and prediction count.
    """
    found: list[bool] = []  # by a region, for each thing
    found_whole: list[bool] = []  # by the whole page
    right_regions: list[bool] = []
    times_ms: list[tuple[float, float]] = []
    for _ in tqdm(range(count), desc=f"{things} things", unit="page", disable=None, leave=False):
        page, entity_ids = pages.draw(things, _SMALL if small else _AREAS)
        answer, elapsed_ms = recognise(recognizer, page, RecognizeOptions(top_k=MAX_THINGS, regions="auto"))
        whole, whole_ms = recognise(recognizer, page, RecognizeOptions(top_k=MAX_THINGS))
        regions = [region.predictions[0].entity_id for region in answer.regions or ()]
        if small:
            regions = regions[:1] or [answer.predictions[0].entity_id]
        predicted = [prediction.entity_id for prediction in whole.predictions[:things]]
        right_regions += [each in entity_ids for each in regions]
        found += [each in regions for each in entity_ids]
        found_whole += [each in predicted for each in entity_ids]
        times_ms.append((elapsed_ms, whole_ms))
    p50_ms, p50_ms_whole = np.median(times_ms, axis=0).tolist()
    return {
        **_share("recall", found),
        **_share("recall_whole", found_whole),
        "ratio": sum(found) / sum(found_whole) if any(found_whole) else None,
        "ratio_interval": ratio_interval(
            found, found_whole, np.repeat([str(number) for number in range(count)], things)
        ),
        **_share("precision", right_regions),
        "p50_ms": p50_ms,
        "p50_ms_whole": p50_ms_whole,
    }


def _share(name: str, flags: Sequence[bool]) -> dict[str, Any]:
    """Return the percentage of what is true, and its interval. Without flags both are None."""
    right, count = sum(flags), len(flags)
    return {
        name: 100 * right / count if count else None,
        f"{name}_interval": share_interval(right, count) if count else None,
    }


def read_queries(path: Path) -> list[tuple[str, Path]]:
    """Return the entity and the image of each valid query. Raises `UserError` if the file has none."""
    pairs = [item for item in read_pairs(path) if isinstance(item, Pair)]
    if not pairs:
        raise UserError(f"{path} has no queries")
    return [(pair.entity_id, pair.image.path) for pair in pairs]


@click.command(context_settings={"show_default": True})
@click.option("--bundle", type=click.Path(path_type=Path), required=True, help="The bundle to search.")
@click.option("--queries", type=click.Path(path_type=Path, exists=True), required=True, help="Things to show, JSONL.")
@click.option("--backgrounds", type=click.Path(path_type=Path), help="Folder of photographs for half of the pages.")
@click.option("--pages", "count", default=60, type=click.IntRange(1), help="Pages for each number of things.")
@click.option("--seed", default=0, help="Of the pages.")
@click.option("--out", type=click.Path(path_type=Path), help="Figures, JSON.")
def main(bundle: Path, queries: Path, backgrounds: Path | None, count: int, seed: int, out: Path | None) -> None:
    """Measure how well the things on a page are found, and print the figures."""
    photographs = [] if backgrounds is None else sorted(backgrounds.rglob("*.jpg"))
    pages = Pages(read_queries(queries), photographs, seed)
    figures = {}
    with Recognizer.open(bundle, Settings(cache="off")) as recognizer:
        for name in (*map(str, range(1, MAX_THINGS + 1)), SMALL):
            things = 1 if name == SMALL else int(name)
            figures[name] = measure(recognizer, pages, count, things, small=name == SMALL)
    settings = {"bundle": bundle.name, "queries": queries.name, "pages": count, "seed": seed}
    report = json.dumps({**describe_run(settings), "figures": figures}, indent=1)
    click.echo(report)
    if out is not None:
        atomic_write_bytes(out, report.encode())


if __name__ == "__main__":
    run(main, name="python -m evaluation.regions")
