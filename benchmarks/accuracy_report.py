"""The report of `wikiclip evaluate --report`: figures, plots, and the confusions that cost most, as one HTML file."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.evaluation import RECALL_AT, Answered, Evaluation, confidences_of, in_words
from benchmarks.page import data_uri, page, section, table
from benchmarks.plots import Bar, Series, bar_plot, line_plot
from benchmarks.statistics import Bootstrap, reliability
from catalog import EntityRecord, is_url, read_catalog
from core.errors import TooLarge, UndecodableImage
from core.files import atomic_write_bytes
from core.metrics import recall_at_k
from imaging import decode
from index.store import StoredEntity
from service.recognizer import Recognizer
from wikiclip.answers import Prediction

CONFUSIONS = 24
_IMAGE_PX = 160
_MAX_PIXELS = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Queries for one entity that were answered with another; `cost` adds up how sure each answer was."""

    truth: StoredEntity
    answer: Prediction
    queries: int
    cost: float
    image: Path | None  # of the surest


def confusions(answered: Sequence[Answered]) -> list[Confusion]:
    """All confusions of held entities, dearest first. Without a calibration every wrong answer costs 1."""
    by_pair: dict[tuple[str, str], list[tuple[float, Answered, StoredEntity, Prediction]]] = {}
    for each in answered:
        if each.held and each.entity is not None and each.best is not None and each.rank != 1:
            cost = 1.0 if each.best.confidence is None else each.best.confidence
            key = each.entity.entity_id, each.best.entity_id
            by_pair.setdefault(key, []).append((cost, each, each.entity, each.best))
    found = []
    for wrong in by_pair.values():
        _, surest, truth, answer = max(wrong, key=lambda item: item[0])
        cost = sum(item[0] for item in wrong)
        found.append(Confusion(truth=truth, answer=answer, queries=len(wrong), cost=cost, image=surest.image))
    return sorted(found, key=lambda each: -each.cost)


def write_report(
    path: Path,
    recognizer: Recognizer,
    evaluation: Evaluation,
    answered: Sequence[Answered],
    *,
    catalog: Path | None,
    left_out: int,
) -> None:
    """Write the report durably. Images of entities come from `catalog`, else from the bundle's thumbnails."""
    shown = confusions(answered)[:CONFUSIONS]
    wanted = {each.truth.entity_id for each in shown} | {each.answer.entity_id for each in shown}
    images = {} if catalog is None else _catalog_images(catalog, wanted)
    with recognizer.acquire() as snapshot:
        for entity_id in wanted - images.keys():
            if webp := snapshot.entities.thumbnail(entity_id):
                images[entity_id] = data_uri(webp, "image/webp")
        searched = snapshot.entities.entity_count - left_out
    held = [each for each in answered if each.held]
    parts = [_summary(evaluation, searched, left_out), _by_split(evaluation), _recall_curve(held)]
    confidences, correct = confidences_of(held)
    if confidences:
        parts.append(_reliability(confidences, correct, evaluation))
    parts.append(_confusion_cards(shown, images))
    atomic_write_bytes(path, page(f"Accuracy of {recognizer.label}", "\n".join(parts)).encode())


def _summary(evaluation: Evaluation, searched: int, left_out: int) -> str:
    rows = []
    for name, value in (("seen", evaluation.seen), ("unseen", evaluation.unseen), ("HM", evaluation.hm)):
        if value is not None:
            rows.append([f"top-1, {name}", f"{value:.1f} %", in_words(evaluation.intervals[name.lower()])])
    if evaluation.ece is not None:
        rows.append(["expected calibration error, 15 bins", f"{evaluation.ece:.3f}", ""])
    if evaluation.auroc is not None:
        interval = in_words(evaluation.intervals["auroc"], 3)
        rows.append(["AUROC, known against unknown", f"{evaluation.auroc:.3f}", interval])
    if evaluation.auroc_right is not None:
        rows.append(["AUROC, answered right against unknown", f"{evaluation.auroc_right:.3f}", ""])
    told = (
        f"{evaluation.queries} queries, {evaluation.unknown} of them for entities that cannot be found, counted apart; "
        f"{evaluation.rejected} lines or images rejected; {searched} entities searched, "
        f"{left_out} left out. An image that cannot be read counts as wrong."
    )
    return f"<p>{escape(told)}</p>{table(['figure', 'value', '95 % interval'], rows)}"


def _by_split(evaluation: Evaluation) -> str:
    header = ["split", "queries", *(cell for k in RECALL_AT for cell in (f"recall@{k}", "95 % interval"))]
    rows, bars = [], []
    for split, row in evaluation.recall.items():
        figures = [(f"{row[f'recall_at_{k}']:.1f} %", in_words(row.get(f"interval_at_{k}"))) for k in RECALL_AT]
        rows.append([split, str(row["queries"]), *(cell for pair in figures for cell in pair)])
        value, interval = row["recall_at_1"], row.get("interval_at_1")
        if not isinstance(value, tuple) and isinstance(interval, tuple):
            bars.append(Bar(name=split, value=value, interval=interval))
    plot = bar_plot(bars, title="Top-1 accuracy by split", x_label="top-1, %", x_range=(0, 100)) if bars else ""
    return section("Accuracy by split", plot, table(header, rows))


def _recall_curve(held: Sequence[Answered]) -> str:
    bootstrap, series = Bootstrap(), []
    for name, part in (("seen", True), ("unseen", False), ("all", None)):
        ranks = [each.rank for each in held if part is None or each.seen is part]
        if ranks:
            hits = [sum(rank is not None and rank <= k for rank in ranks) for k in range(1, max(RECALL_AT) + 1)]
            series.append(
                Series(
                    name=name,
                    points=[(k, recall_at_k(ranks, k)) for k in range(1, max(RECALL_AT) + 1)],
                    intervals=[bootstrap.share(count, len(ranks)) for count in hits],
                )
            )
    if not series:
        return ""
    return section(
        "Recall", line_plot(series, title="Recall at k", x_label="k, predictions looked at", y_label="recall@k, %")
    )


def _reliability(confidences: Sequence[float], correct: Sequence[bool], evaluation: Evaluation) -> str:
    bins = reliability(confidences, correct)
    plot = line_plot(
        [Series(name="this bundle", points=[(each.confidence, each.accuracy) for each in bins])],
        title="Reliability",
        x_label="confidence of the best prediction",
        y_label="share that is right",
        x_range=(0, 1),
        y_range=(0, 1),
        diagonal=True,
    )
    rows = [[f"{each.confidence:.3f}", f"{each.accuracy:.3f}", str(each.count)] for each in bins]
    told = (
        "On the dotted line a confidence means what it says. The expected calibration error is the mean distance to it "
        f"over the queries: {evaluation.ece:.3f}."
    )
    return section("Confidence", f"<p>{told}</p>", plot, table(["mean confidence", "share right", "queries"], rows))


def _confusion_cards(shown: Sequence[Confusion], images: dict[str, str]) -> str:
    cards = []
    for each in shown:
        query = None if each.image is None else _small(each.image.read_bytes())
        sure = "" if each.answer.confidence is None else f", {100 * each.answer.confidence:.0f} % sure"
        figures = (
            _figure(query, "the query"),
            _figure(images.get(each.answer.entity_id), f"answered: {each.answer.title}{sure}"),
            _figure(images.get(each.truth.entity_id), f"right: {each.truth.title}"),
        )
        note = f'<p class="muted">{each.queries} queries</p>' if each.queries > 1 else ""
        cards.append(f'<div class="card"><div class="images">{"".join(figures)}</div>{note}</div>')
    told = "Wrong answers, those that were surest first."
    return section("Confusions that cost most", f'<p>{told}</p><div class="cards">{"".join(cards)}</div>')


def _figure(uri: str | None, caption: str) -> str:
    image = f'<img src="{uri}" alt="">' if uri else '<div class="none">no image</div>'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _catalog_images(catalog: Path, wanted: Collection[str]) -> dict[str, str]:
    """The first image that can be read of each wanted entity, as a data URI."""
    images: dict[str, str] = {}
    for item in read_catalog(catalog):
        if isinstance(item, EntityRecord) and item.entity_id in wanted:
            local = (Path(image) for image in item.images if not is_url(image) and Path(image).is_file())
            uris = (uri for image in local if (uri := _small(image.read_bytes())))
            if uri := next(uris, None):
                images[item.entity_id] = uri
    return images


def _small(data: bytes) -> str | None:
    """An image shrunk to a data URI, None where it does not decode."""
    try:
        image = decode(data, max_pixels=_MAX_PIXELS, target_px=_IMAGE_PX)
    except (UndecodableImage, TooLarge):
        return None
    image.thumbnail((_IMAGE_PX, _IMAGE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return data_uri(buffer.getvalue(), "image/webp")
