"""Accuracy of a bundle on labelled queries, through the very recogniser that serves it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from core.errors import CatalogError, UserError
from core.files import durable
from core.jsonl import Rejected, RejectLog
from core.metrics import harmonic_mean, rank_of, recall_at_k
from model.data import Pair, read_pairs
from service.answers import Recognition, RecognizeOptions
from service.recognizer import Recognizer

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One query, and the 1-based rank at which its entity was found (None: not among the first ten)."""

    data_split: str
    seen: bool | None
    rank: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Percentages. `seen`, `unseen` and `hm` are top-1 accuracies, None where no split of that kind was asked."""

    queries: int
    rejected: int
    recall: dict[str, dict[str, float]]  # each data_split, seen, unseen, all -> {"queries", "recall_at_1", ...}
    seen: float | None
    unseen: float | None
    hm: float | None


def evaluate(
    recognizer: Recognizer,
    query_files: Sequence[Path],
    predictions_path: Path,
    *,
    image_root: Path | None,
    batch_size: int,
    ovenid2impath: Path | None = None,
) -> Evaluation:
    """Recognise every query and write `{"data_id", "pred_entity_id"}` for each, none left out, in order.

    A query whose image cannot be read is predicted as "" and counts as wrong; a line that is no query goes to
    `rejected.jsonl` beside the predictions. Raises `CatalogError` if a file holds no query at all.
    """
    rejects = RejectLog(predictions_path.with_name("rejected.jsonl"))
    answered: list[Answered] = []
    with durable(predictions_path) as temporary, temporary.open("w", encoding="utf-8") as out:
        for path in query_files:
            before = len(answered)
            pairs = iter(tqdm(_queries(path, image_root, ovenid2impath, rejects), desc=path.name, unit="query"))
            while batch := list(islice(pairs, batch_size)):
                for pair, predicted in zip(batch, _predict(recognizer, batch, rejects), strict=True):
                    first = predicted[0] if predicted else ""
                    out.write(json.dumps({"data_id": pair.data_id, "pred_entity_id": first}) + "\n")
                    rank = rank_of(pair.entity_id, predicted)
                    answered.append(Answered(data_split=pair.data_split, seen=pair.seen, rank=rank))
            if len(answered) == before:
                raise CatalogError(f"{path} holds no query that can be used; see {rejects.path}")
    return summarise(answered, rejected=rejects.count)


def summarise(answered: Sequence[Answered], *, rejected: int) -> Evaluation:
    """Accuracies by split and over all queries."""
    ranks = {
        split: [a.rank for a in answered if a.data_split == split] for split in sorted({a.data_split for a in answered})
    }
    parts = {
        "seen": [a.rank for a in answered if a.seen is True],
        "unseen": [a.rank for a in answered if a.seen is False],
    }
    ranks |= {part: found for part, found in parts.items() if found}
    ranks["all"] = [a.rank for a in answered]
    seen, unseen = (recall_at_k(parts[part], 1) if parts[part] else None for part in ("seen", "unseen"))
    return Evaluation(
        queries=len(answered),
        rejected=rejected,
        recall={name: _recalls(found) for name, found in ranks.items()},
        seen=seen,
        unseen=unseen,
        hm=None if seen is None or unseen is None else harmonic_mean(seen, unseen),
    )


def _recalls(ranks: Sequence[int | None]) -> dict[str, float]:
    return {"queries": len(ranks)} | {f"recall_at_{k}": round(recall_at_k(ranks, k), 2) for k in RECALL_AT}


def _queries(path: Path, image_root: Path | None, ovenid2impath: Path | None, rejects: RejectLog) -> Iterator[Pair]:
    for item in read_pairs(path, image_root, ovenid2impath):
        if isinstance(item, Rejected):
            rejects.add(item)
        else:
            yield item


def _predict(recognizer: Recognizer, pairs: Iterable[Pair], rejects: RejectLog) -> Iterator[list[str]]:
    pairs = list(pairs)
    answers = recognizer.recognize_many(
        [p.image.path.read_bytes() for p in pairs], RecognizeOptions(top_k=max(RECALL_AT))
    )
    for pair, answer in zip(pairs, answers, strict=True):
        if isinstance(answer, Recognition):
            yield [prediction.entity_id for prediction in answer.predictions]
        else:
            assert isinstance(answer, UserError)
            rejects.add(Rejected(line=pair.image.line, reason=answer.detail, record=pair.image.record))
            yield []


def as_table(evaluation: Evaluation) -> str:
    """The figures as lines of text, a split a line."""
    lines = [f"{'split':<24} {'queries':>8} " + " ".join(f"{f'R@{k}':>6}" for k in RECALL_AT)]
    for split, row in evaluation.recall.items():
        lines.append(
            f"{split:<24} {row['queries']:>8} " + " ".join(f"{row[f'recall_at_{k}']:>6.1f}" for k in RECALL_AT)
        )
    figures = (("seen", evaluation.seen), ("unseen", evaluation.unseen), ("HM", evaluation.hm))
    lines.append("top-1: " + ", ".join(f"{name} {value:.1f}" for name, value in figures if value is not None))
    return "\n".join(lines)
