"""The HTML report of `wikiclip evaluate --report`: figures, plots and the costliest confusions."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from catalog import EntityRecord, is_url, read_catalog
from core.errors import TooLarge, UndecodableImage
from core.files import atomic_write_bytes
from evaluation.metrics import (
    RECALL_AT,
    AnsweredQuery,
    Bootstrap,
    Evaluation,
    ReliabilityBin,
    confidences_of,
    format_interval,
    recall_at_k,
    reliability,
)
from evaluation.pages import Bar, Series, bar_plot, data_uri, line_plot, render
from imaging import decode
from index.store import StoredEntity
from service.recognizer import Recognizer
from wikiclip.answers import Prediction

CONFUSIONS = 24
_IMAGE_PX = 160
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Queries for the entity `truth` that got the wrong `answer`. `cost` is the sum of their confidences."""

    truth: StoredEntity
    answer: Prediction
    queries: int
    cost: float
    image: Path | None  # of the most confident query

    @property
    def query_image(self) -> str | None:
        return None if self.image is None else _thumbnail(self.image.read_bytes())


def confusions(answered: Sequence[AnsweredQuery]) -> list[Confusion]:
    """Return all confusions of entities in the catalog by falling cost. Without confidences, each answer costs 1."""
    by_pair: dict[tuple[str, str], list[tuple[float, Path | None, StoredEntity, Prediction]]] = {}
    for each in answered:
        if each.in_catalog and each.entity is not None and each.best is not None and each.rank != 1:
            cost = 1.0 if each.best.confidence is None else each.best.confidence
            key = each.entity.entity_id, each.best.entity_id
            by_pair.setdefault(key, []).append((cost, each.image, each.entity, each.best))
    found = []
    for wrong in by_pair.values():
        _, image, truth, answer = max(wrong, key=lambda item: item[0])
        cost = sum(item[0] for item in wrong)
        found.append(Confusion(truth=truth, answer=answer, queries=len(wrong), cost=cost, image=image))
    return sorted(found, key=lambda each: -each.cost)


def write_report(
    path: Path,
    recognizer: Recognizer,
    evaluation: Evaluation,
    answered: Sequence[AnsweredQuery],
    *,
    catalog: Path | None,
    held_out: int,
) -> None:
    """Write the report. Images of entities come from `catalog`, otherwise from the bundle's thumbnails."""
    shown = confusions(answered)[:CONFUSIONS]
    shown_ids = {each.truth.entity_id for each in shown} | {each.answer.entity_id for each in shown}
    images = {} if catalog is None else _catalog_images(catalog, shown_ids)
    with recognizer.acquire() as loaded:
        for entity_id in shown_ids - images.keys():
            if webp := loaded.entities.thumbnail(entity_id):
                images[entity_id] = data_uri(webp, "image/webp")
        searched = loaded.entities.entity_count - held_out
    found = [each for each in answered if each.in_catalog]
    confidences, correct = confidences_of(found)
    bins = reliability(confidences, correct)
    document = render(
        "report.html",
        title=f"Accuracy of {recognizer.label}",
        evaluation=evaluation,
        searched=searched,
        held_out=held_out,
        split_plot=_split_plot(evaluation),
        recall_plot=_recall_plot(found),
        bins=bins,
        recall_at=RECALL_AT,
        format_interval=format_interval,
        reliability_plot=_reliability_plot(bins) if bins else "",
        confusions=shown,
        images=images,
    )
    atomic_write_bytes(path, document.encode())


def _split_plot(evaluation: Evaluation) -> str:
    bars = [
        Bar(name=split, value=value, interval=interval)
        for split, row in evaluation.recall.items()
        if isinstance(value := row["recall_at_1"], float) and isinstance(interval := row.get("interval_at_1"), tuple)
    ]
    return bar_plot(bars, title="Top-1 accuracy by split", x_label="top-1, %", x_range=(0, 100)) if bars else ""


def _recall_plot(found: Sequence[AnsweredQuery]) -> str:
    bootstrap, series, ks = Bootstrap(), [], range(1, max(RECALL_AT) + 1)
    for name, part in (("seen", True), ("unseen", False), ("all", None)):
        ranks = [each.rank for each in found if part is None or each.seen is part]
        if ranks:
            recalls = [recall_at_k(ranks, k) for k in ks]
            intervals = [bootstrap.share(round(recall * len(ranks) / 100), len(ranks)) for recall in recalls]
            series.append(Series(name=name, points=list(zip(ks, recalls, strict=True)), intervals=intervals))
    if not series:
        return ""
    return line_plot(series, title="Recall at k", x_label="k, number of predictions", y_label="recall@k, %")


def _reliability_plot(bins: Sequence[ReliabilityBin]) -> str:
    return line_plot(
        [Series(name="this bundle", points=[(each.confidence, each.accuracy) for each in bins])],
        title="Reliability",
        x_label="confidence of the best prediction",
        y_label="accuracy",
        x_range=(0, 1),
        y_range=(0, 1),
        diagonal=True,
    )


def _catalog_images(catalog: Path, entity_ids: Collection[str]) -> dict[str, str]:
    """Return the first readable image of each of these entities as a data URI."""
    images: dict[str, str] = {}
    for item in read_catalog(catalog):
        if isinstance(item, EntityRecord) and item.entity_id in entity_ids:
            local = (Path(image) for image in item.images if not is_url(image) and Path(image).is_file())
            uris = (uri for image in local if (uri := _thumbnail(image.read_bytes())))
            if uri := next(uris, None):
                images[item.entity_id] = uri
    return images


def _thumbnail(data: bytes) -> str | None:
    """Return a small version of an image as a data URI, None if it does not decode."""
    try:
        image = decode(data, max_pixels=_MAX_PIXELS, target_px=_IMAGE_PX)
    except (UndecodableImage, TooLarge):
        return None
    image.thumbnail((_IMAGE_PX, _IMAGE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return data_uri(buffer.getvalue(), "image/webp")
