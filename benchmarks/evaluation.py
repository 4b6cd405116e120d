"""Accuracy of a bundle on labelled queries, through the very recogniser that serves it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from benchmarks.statistics import Bootstrap, Interval, auroc, calibration_error, reliability
from core.errors import BadRequest, CatalogError, UnknownEntity, UserError
from core.files import atomic_write
from core.jsonl import Rejected, RejectLog
from core.metrics import harmonic_mean, rank_of, recall_at_k
from index.store import StoredEntity
from model.data import Pair, read_pairs
from service.recognizer import Recognizer
from wikiclip.answers import Prediction, Recognition, RecognizeOptions

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One query, and the 1-based rank at which its entity was found (None: not among the first ten).

    `held` says whether the entity could be found at all. `entity` is its record; `best` the first prediction and
    `known` the probability that came with it, None where the image could not be read.
    """

    data_split: str
    seen: bool | None
    rank: int | None
    held: bool = True
    image: Path | None = None
    entity: StoredEntity | None = None
    best: Prediction | None = None
    known: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracies in percent, of the `queries - unknown` queries whose entity the bundle holds; None where there is no
    query of that kind. Intervals hold 95 %.

    `oven` has what OVEN's evaluator makes of the predictions file: there unknown queries count as wrong. `ece` is the
    expected calibration error of the best prediction's confidence, `auroc` how often a known query is told from an
    unknown one; both 0 to 1, None without calibration or without such queries. `auroc_right` is that of the known
    queries that were answered right.
    """

    queries: int
    unknown: int
    rejected: int
    recall: dict[
        str, dict[str, float | Interval]
    ]  # each data_split, seen, unseen, ... -> {"queries", "recall_at_1", ...}
    seen: float | None
    unseen: float | None
    hm: float | None
    intervals: dict[str, Interval]  # of seen, unseen, hm, auroc, as far as there are
    oven: dict[str, float | None] = field(default_factory=dict)
    ece: float | None = None
    auroc: float | None = None
    auroc_right: float | None = None


def answer_queries(
    recognizer: Recognizer,
    query_files: Sequence[Path],
    predictions_path: Path,
    *,
    image_root: Path | None,
    batch_size: int,
    ovenid2impath: Path | None = None,
    left_out: frozenset[int] = frozenset(),
) -> tuple[list[Answered], int]:
    """Recognise every query and write `{"data_id", "pred_entity_id"}` for each, none left out, in order.

    A query whose image is missing or cannot be read is predicted as "" and counts as wrong; a line that is no query
    goes to `rejected.jsonl` beside the predictions. `left_out` are the rows that cannot be found. Returns the answers
    and how many lines and images were rejected. Raises `CatalogError` if a file holds no query at all.
    """
    rejects = RejectLog(predictions_path.with_name("rejected.jsonl"))
    answered: list[Answered] = []
    with atomic_write(predictions_path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for path in query_files:
            before = len(answered)
            pairs = iter(tqdm(_queries(path, image_root, ovenid2impath, rejects), desc=path.name, unit="query"))
            while batch := list(islice(pairs, batch_size)):
                for pair, answer in zip(batch, _recognize(recognizer, batch, rejects), strict=True):
                    best = answer.predictions[0] if answer and answer.predictions else None
                    first = best.entity_id if best else ""
                    out.write(json.dumps({"data_id": pair.data_id, "pred_entity_id": first}) + "\n")
                    answered.append(_answered(pair, answer, _stored(recognizer, pair.entity_id), left_out))
            if len(answered) == before:
                raise CatalogError(f"{path} holds no query that can be used; see {rejects.path}")
    return answered, rejects.count


def _answered(
    pair: Pair, answer: Recognition | None, entity: StoredEntity | None, left_out: frozenset[int]
) -> Answered:
    predictions = answer.predictions if answer else ()
    return Answered(
        data_split=pair.data_split,
        seen=pair.seen,
        rank=rank_of(pair.entity_id, [prediction.entity_id for prediction in predictions]),
        held=entity is not None and entity.row not in left_out,
        image=pair.image.path,
        entity=entity,
        best=predictions[0] if predictions else None,
        known=answer.in_catalog_probability if answer else None,
    )


def _stored(recognizer: Recognizer, entity_id: str) -> StoredEntity | None:
    try:
        with recognizer.acquire() as snapshot:
            return snapshot.entities.get(entity_id)
    except UnknownEntity:
        return None


def _queries(path: Path, image_root: Path | None, ovenid2impath: Path | None, rejects: RejectLog) -> Iterator[Pair]:
    for item in read_pairs(path, image_root, ovenid2impath, missing_ok=True):
        if isinstance(item, Rejected):
            rejects.add(item)
        else:
            yield item


def _recognize(recognizer: Recognizer, pairs: Sequence[Pair], rejects: RejectLog) -> Iterator[Recognition | None]:
    images = [_read(pair.image.path) for pair in pairs]
    readable = [image for image in images if isinstance(image, bytes)]
    answers = iter(recognizer.recognize_many(readable, RecognizeOptions(top_k=max(RECALL_AT))))
    for pair, image in zip(pairs, images, strict=True):
        answer = next(answers) if isinstance(image, bytes) else image
        if isinstance(answer, Recognition):
            yield answer
        else:
            rejects.add(Rejected(line=pair.image.line, reason=answer.detail, record=pair.image.record))
            yield None


def _read(path: Path) -> bytes | UserError:
    try:
        return path.read_bytes()
    except OSError as error:
        return BadRequest(f"image {path} cannot be read ({error.strerror}); it counts as wrong")


def summarise(answered: Sequence[Answered], *, rejected: int) -> Evaluation:
    """Accuracies by split and over all queries whose entity is held, and how far the confidences can be trusted."""
    held = [each for each in answered if each.held]
    unknown = [each for each in answered if not each.held]
    bootstrap = Bootstrap()
    groups = {split: [a.rank for a in held if a.data_split == split] for split in sorted({a.data_split for a in held})}
    kinds: dict[str, Callable[[Answered], bool]] = {
        "seen": lambda a: a.seen is True,
        "unseen": lambda a: a.seen is False,
        "without_image": lambda a: a.entity is not None and a.entity.image_count == 0,
        "without_text": lambda a: a.entity is not None and not a.entity.has_text,
    }
    groups |= {name: ranks for name, kind in kinds.items() if (ranks := [a.rank for a in held if kind(a)])}
    groups["all"] = [a.rank for a in held]
    seen, unseen, hm = _seen_unseen_hm(held)
    intervals: dict[str, Interval] = {}
    hits = {
        name: (sum(rank == 1 for rank in groups[name]), len(groups[name]))
        for name in ("seen", "unseen")
        if name in groups
    }
    for name, (right, total) in hits.items():
        intervals[name] = _rounded(bootstrap.share(right, total))
    if len(hits) == 2:
        intervals["hm"] = _rounded(bootstrap.harmonic_mean(hits["seen"], hits["unseen"]))
    known_as = [a.known for a in held if a.known is not None]
    unknown_as = [a.known for a in unknown if a.known is not None]
    right_as = [a.known for a in held if a.known is not None and a.rank == 1]
    if known_as and unknown_as:
        intervals["auroc"] = _rounded(bootstrap.auroc(known_as, unknown_as), 4)
    confidences, correct = confidences_of(held)
    return Evaluation(
        queries=len(answered),
        unknown=len(unknown),
        rejected=rejected,
        recall={name: _recalls(ranks, bootstrap) for name, ranks in groups.items()},
        seen=seen,
        unseen=unseen,
        hm=hm,
        intervals=intervals,
        oven=dict(zip(("seen", "unseen", "hm"), _seen_unseen_hm(answered), strict=True)),
        ece=round(calibration_error(reliability(confidences, correct)), 4) if confidences else None,
        auroc=round(auroc(known_as, unknown_as), 4) if known_as and unknown_as else None,
        auroc_right=round(auroc(right_as, unknown_as), 4) if right_as and unknown_as else None,
    )


def confidences_of(answered: Iterable[Answered]) -> tuple[list[float], list[bool]]:
    """The confidence of each best prediction that has one, and whether that prediction was right."""
    sure = [(a.best.confidence, a.rank == 1) for a in answered if a.best and a.best.confidence is not None]
    return [confidence for confidence, _ in sure], [right for _, right in sure]


def _seen_unseen_hm(answered: Sequence[Answered]) -> tuple[float | None, float | None, float | None]:
    ranks = [[a.rank for a in answered if a.seen is part] for part in (True, False)]
    seen, unseen = (recall_at_k(part, 1) if part else None for part in ranks)
    return seen, unseen, None if seen is None or unseen is None else harmonic_mean(seen, unseen)


def _recalls(ranks: Sequence[int | None], bootstrap: Bootstrap) -> dict[str, float | Interval]:
    row: dict[str, float | Interval] = {"queries": len(ranks)}
    row |= {f"recall_at_{k}": round(recall_at_k(ranks, k), 2) for k in RECALL_AT}
    for k in RECALL_AT if ranks else ():
        row[f"interval_at_{k}"] = _rounded(bootstrap.share(sum(r is not None and r <= k for r in ranks), len(ranks)))
    return row


def _rounded(interval: Interval, digits: int = 2) -> Interval:
    return round(interval[0], digits), round(interval[1], digits)


def as_table(evaluation: Evaluation) -> str:
    """The figures as lines of text, a split a line."""
    lines = [f"{'split':<24} {'queries':>8} " + " ".join(f"{f'R@{k}':>6}" for k in RECALL_AT) + "   R@1, 95 % interval"]
    for split, row in evaluation.recall.items():
        lines.append(
            f"{split:<24} {row['queries']:>8} "
            + " ".join(f"{row[f'recall_at_{k}']:>6.1f}" for k in RECALL_AT)
            + f"   {in_words(row.get('interval_at_1'))}"
        )
    figures = (("seen", evaluation.seen), ("unseen", evaluation.unseen), ("HM", evaluation.hm))
    told = [f"{n} {v:.1f} ({in_words(evaluation.intervals[n.lower()])})" for n, v in figures if v is not None]
    lines.append("top-1: " + ", ".join(told))
    if evaluation.ece is not None:
        lines.append(f"confidence: expected calibration error {evaluation.ece:.3f}")
    if evaluation.unknown:
        line = f"{evaluation.unknown} queries for entities that cannot be found, counted apart"
        if evaluation.auroc is not None:
            interval = in_words(evaluation.intervals["auroc"], 3)
            line += f": AUROC of known against unknown {evaluation.auroc:.3f} ({interval})"
        if evaluation.auroc_right is not None:
            line += f", of what is named right {evaluation.auroc_right:.3f}"
        lines.append(line)
    return "\n".join(lines)


def in_words(interval: object, digits: int = 1) -> str:
    """An interval as text, empty where there is none."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if isinstance(interval, tuple) else ""
