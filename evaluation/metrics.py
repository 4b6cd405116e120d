"""Accuracy, calibration and detection of unknown entities, with 95 % intervals.

Intervals of shares are Wilson's score intervals, which are right for all of 60 queries, too. The others are from
resampling.

Denominators count the references: a query without an answer counts as wrong.

Shapes: N queries, G groups of queries, R resamplings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from core.arrays import Float64Array
from core.statistics import wilson_interval
from evaluation.levels import Step, summarise_levels

if TYPE_CHECKING:
    from index.store import StoredEntity
    from wikiclip.answers import Prediction

RECALL_AT = (1, 5, 10)
RESAMPLINGS = 2000
CALIBRATION_BINS = 15

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class AnsweredQuery:
    """One query and its result. `rank` is 1-based and None if the entity is not among the first ten predictions.

    `in_catalog` is False for a query whose entity cannot be found. `best`, `in_catalog_probability` and `abstained` are
    None if the image cannot be read. `levels` is None if the entity's types are unknown, or without a level model.
    """

    data_split: str
    seen: bool | None
    rank: int | None
    in_catalog: bool = True
    image: Path | None = None
    embedding: Sequence[float] | None = None  # instead of the image
    entity: StoredEntity | None = None
    best: Prediction | None = None
    in_catalog_probability: float | None = None
    abstained: bool | None = None
    levels: tuple[Step, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one evaluation. Accuracies are in percent, intervals hold 95 %, None means no such query.

    `unknown` queries, whose entity cannot be found, count only in `oven`, `auroc` and `auroc_right`. `oven` is the
    result of OVEN's own evaluator, which counts them as wrong. `ece` is the expected calibration error of the best
    prediction. `auroc` ranks queries in the catalog above unknown ones; `auroc_right` takes only those answered right.
    `abstained` has the share of answers that abstain ("queries", "percent", "interval") of queries in the catalog
    (`all`), of those answered right (`right`) and of unknown ones (`unknown`). It is empty without calibration.
    `levels` is what `summarise_levels` returns.
    """

    queries: int
    unknown: int
    rejected: int
    recall: dict[str, dict[str, float | Interval]]  # by split: "queries", "recall_at_1", "interval_at_1", ...
    seen: float | None
    unseen: float | None
    hm: float | None
    intervals: dict[str, Interval]  # of seen, unseen, hm and auroc, where these exist
    oven: dict[str, float | None] = field(default_factory=dict)
    ece: float | None = None
    auroc: float | None = None
    auroc_right: float | None = None
    abstained: dict[str, dict[str, float | Interval]] = field(default_factory=dict)
    levels: dict[str, Any] = field(default_factory=dict)


def rank_of(entity: str | int, predicted: Sequence[str | int]) -> int | None:
    """Return the 1-based rank of the entity, an id or a row, among the predictions, None if it is missing."""
    return predicted.index(entity) + 1 if entity in predicted else None


def recall_at_k(ranks: Sequence[int | None], k: int) -> float:
    """Return the percentage of queries whose entity is among the first `k` predictions, 0 without queries."""
    return 100 * _hits(ranks, k) / len(ranks) if ranks else 0.0


def harmonic_mean(seen: float, unseen: float) -> float:
    """Return OVEN's HM of the accuracies on seen and unseen entities."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0


def share_interval(hits: int, queries: int) -> Interval:
    """Return the 95 % interval of a percentage of queries, Wilson's score interval."""
    low, high = wilson_interval(hits, queries)
    return 100 * low, 100 * high


def harmonic_mean_interval(seen: tuple[int, int], unseen: tuple[int, int]) -> Interval:
    """Return the 95 % interval of the HM of two percentages, each given as (hits, queries)."""
    rng = np.random.default_rng(0)
    pairs = zip(_shares(rng, *seen), _shares(rng, *unseen), strict=True)
    return percentile_interval(np.array([harmonic_mean(one, other) for one, other in pairs]))


def _shares(rng: np.random.Generator, hits: int, queries: int) -> Float64Array:
    # From the posterior of Jeffreys' prior: resampling the queries would never vary from 0 or 100 %.
    return 100 * rng.beta(hits + 0.5, queries - hits + 0.5, RESAMPLINGS)


def percentile_interval(values_R: Float64Array) -> Interval:
    """Return the bounds of the middle 95 % of the values."""
    low, high = np.percentile(values_R, (2.5, 97.5))
    return float(low), float(high)


def ratio_interval(right_N: ArrayLike, other_right_N: ArrayLike, group_N: ArrayLike) -> Interval | None:
    """Return the 95 % interval of how many times as many queries are right as with another method.

    It is paired, and resamples whole groups: the queries of one entity are not independent. None: no upper bound.
    """
    _, group_of_N = np.unique(group_N, return_inverse=True)
    right_G, other_G = (np.bincount(group_of_N, np.asarray(each, float)) for each in (right_N, other_right_N))
    rng = np.random.default_rng(0)
    ratios_R = np.full(RESAMPLINGS, np.inf)
    for number in range(RESAMPLINGS):
        drawn_G = rng.integers(len(right_G), size=len(right_G))
        if other := other_G[drawn_G].sum():
            ratios_R[number] = right_G[drawn_G].sum() / other
    low, high = np.percentile(ratios_R, (2.5, 97.5), method="nearest")
    return (float(low), float(high)) if np.isfinite(high) else None


def auroc(positive: Any, negative: Any) -> float:
    """Return the area under the ROC curve: the share of pairs with the positive value higher; ties count half."""
    ordered = np.sort(np.asarray(negative, np.float64))
    below, up_to = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + up_to).mean() / 2 / len(ordered))


def auroc_interval(positive: Sequence[float], negative: Sequence[float]) -> Interval:
    """Return the 95 % interval of `auroc`."""
    rng = np.random.default_rng(0)
    drawn = [auroc(rng.choice(positive, len(positive)), rng.choice(negative, len(negative))) for _ in range(500)]
    return percentile_interval(np.array(drawn))


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Answers of similar confidence: their number, mean confidence and accuracy."""

    count: int
    confidence: float
    accuracy: float


def reliability(
    confidences_N: Sequence[float], correct_N: Sequence[bool], bins: int = CALIBRATION_BINS
) -> list[ReliabilityBin]:
    """Return the non-empty bins of equal width, by rising confidence."""
    confidences, correct = np.asarray(confidences_N, np.float64), np.asarray(correct_N, np.float64)
    bins_N = np.minimum((confidences * bins).astype(int), bins - 1)
    masks = [bins_N == number for number in np.unique(bins_N)]
    return [
        ReliabilityBin(
            count=int(mask.sum()), confidence=float(confidences[mask].mean()), accuracy=float(correct[mask].mean())
        )
        for mask in masks
    ]


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over all answers."""
    distances = [abs(each.confidence - each.accuracy) for each in bins]
    return float(np.average(distances, weights=[each.count for each in bins]))


def summarise(answered: Sequence[AnsweredQuery], *, rejected: int) -> Evaluation:
    """Return accuracies by split and overall, and the quality of confidences and of the detection of unknowns."""
    found = [a for a in answered if a.in_catalog]
    unknown = [a for a in answered if not a.in_catalog]
    groups = _groups(found)
    seen, unseen, hm = _seen_unseen_hm(found)
    hits = {name: (_hits(groups[name], 1), len(groups[name])) for name in ("seen", "unseen") if name in groups}
    intervals: dict[str, Interval] = {name: _rounded(share_interval(*counts)) for name, counts in hits.items()}
    if len(hits) == 2:
        intervals["hm"] = _rounded(harmonic_mean_interval(hits["seen"], hits["unseen"]))
    positive, negative = _probabilities(found), _probabilities(unknown)
    right = _probabilities(a for a in found if a.rank == 1)
    if positive and negative:
        intervals["auroc"] = _rounded(auroc_interval(positive, negative), 4)
    confidences, correct = confidences_of(found)
    return Evaluation(
        queries=len(answered),
        unknown=len(unknown),
        rejected=rejected,
        recall={name: _recalls(ranks) for name, ranks in groups.items()},
        seen=seen,
        unseen=unseen,
        hm=hm,
        intervals=intervals,
        oven=dict(zip(("seen", "unseen", "hm"), _seen_unseen_hm(answered), strict=True)),
        ece=round(calibration_error(reliability(confidences, correct)), 4) if confidences else None,
        auroc=round(auroc(positive, negative), 4) if positive and negative else None,
        auroc_right=round(auroc(right, negative), 4) if right and negative else None,
        abstained=_abstained({"all": found, "right": [a for a in found if a.rank == 1], "unknown": unknown}),
        levels=summarise_levels(answered),
    )


def compare(
    answered: Sequence[AnsweredQuery], others: Sequence[AnsweredQuery]
) -> dict[str, dict[str, float | Interval | None]]:
    """Return how many times as many queries are right as in `others`, the same queries answered by another method.

    With the intervals of `ratio_interval`, for seen, unseen and all. Parts where `others` has no right answer are
    left out.
    """
    ratios: dict[str, dict[str, float | Interval | None]] = {}
    for name, parts in {"seen": (True,), "unseen": (False,), "all": (True, False, None)}.items():
        pairs = [(a, b) for a, b in zip(answered, others, strict=True) if a.entity and a.in_catalog and a.seen in parts]
        right, other = ([each.rank == 1 for each in side] for side in (zip(*pairs, strict=True) if pairs else ((), ())))
        if any(other):
            interval = ratio_interval(right, other, [a.entity.row for a, _ in pairs if a.entity])
            rounded = None if interval is None else _rounded(interval, 3)
            ratios[name] = {"ratio": round(sum(right) / sum(other), 3), "interval": rounded}
    return ratios


def confidences_of(answered: Iterable[AnsweredQuery]) -> tuple[list[float], list[bool]]:
    """Return the confidences of the best predictions, and whether each was right."""
    pairs = [(a.best.confidence, a.rank == 1) for a in answered if a.best and a.best.confidence is not None]
    return [confidence for confidence, _ in pairs], [right for _, right in pairs]


def _abstained(parts: Mapping[str, Sequence[AnsweredQuery]]) -> dict[str, dict[str, float | Interval]]:
    """Return the share of abstentions in each part that has answers of a calibrated bundle."""
    flags = {name: [a.abstained for a in queries if a.abstained is not None] for name, queries in parts.items()}
    return {
        name: {
            "queries": len(each),
            "percent": round(100 * sum(each) / len(each), 2),
            "interval": _rounded(share_interval(sum(each), len(each))),
        }
        for name, each in flags.items()
        if each
    }


def _probabilities(answered: Iterable[AnsweredQuery]) -> list[float]:
    return [a.in_catalog_probability for a in answered if a.in_catalog_probability is not None]


def _groups(answered: Sequence[AnsweredQuery]) -> dict[str, list[int | None]]:
    """Return the ranks of each split that occurs, of each kind of entity that does, and of all."""
    members = {
        split: [a for a in answered if a.data_split == split] for split in sorted({a.data_split for a in answered})
    }
    members["seen"] = [a for a in answered if a.seen is True]
    members["unseen"] = [a for a in answered if a.seen is False]
    members["without_image"] = [a for a in answered if a.entity is not None and a.entity.image_count == 0]
    members["without_text"] = [a for a in answered if a.entity is not None and not a.entity.has_text]
    groups = {name: [a.rank for a in queries] for name, queries in members.items() if queries}
    return groups | {"all": [a.rank for a in answered]}


def _seen_unseen_hm(answered: Sequence[AnsweredQuery]) -> tuple[float | None, float | None, float | None]:
    ranks = [[a.rank for a in answered if a.seen is part] for part in (True, False)]
    seen, unseen = (recall_at_k(part, 1) if part else None for part in ranks)
    return seen, unseen, None if seen is None or unseen is None else harmonic_mean(seen, unseen)


def _recalls(ranks: Sequence[int | None]) -> dict[str, float | Interval]:
    row: dict[str, float | Interval] = {"queries": len(ranks)}
    row |= {f"recall_at_{k}": round(recall_at_k(ranks, k), 2) for k in RECALL_AT}
    if ranks:
        row |= {f"interval_at_{k}": _rounded(share_interval(_hits(ranks, k), len(ranks))) for k in RECALL_AT}
    return row


def _hits(ranks: Iterable[int | None], k: int) -> int:
    return sum(rank is not None and rank <= k for rank in ranks)


def _rounded(interval: Interval, digits: int = 2) -> Interval:
    return round(interval[0], digits), round(interval[1], digits)


def as_table(evaluation: Evaluation) -> str:
    """Return the figures as text, one split per line and one line for splits of the same queries."""
    rows = distinct_splits(evaluation.recall)
    width = max(24, *map(len, rows))
    lines = [
        f"{'split':<{width}} {'queries':>8} " + " ".join(f"{f'R@{k}':>6}" for k in RECALL_AT) + "   R@1, 95 % interval"
    ]
    for name, row in rows.items():
        recalls = " ".join(f"{row[f'recall_at_{k}']:>6.1f}" for k in RECALL_AT)
        lines.append(f"{name:<{width}} {row['queries']:>8} {recalls}   {format_interval(row.get('interval_at_1'))}")
    if evaluation.hm is not None:
        parts = (("seen", evaluation.seen), ("unseen", evaluation.unseen), ("HM", evaluation.hm))
        shown = [f"{name} {value:.1f} ({format_interval(evaluation.intervals[name.lower()])})" for name, value in parts]
        lines.append(f"top-1: {', '.join(shown)}")
    if evaluation.ece is not None:
        lines.append(f"confidence: expected calibration error {evaluation.ece:.3f}")
    if evaluation.abstained:
        of = {"all": "of all answers", "right": "of right ones", "unknown": "for unknown entities"}
        shares = [
            f"{row['percent']:.1f} % {of[name]} ({format_interval(row['interval'])})"
            for name, row in evaluation.abstained.items()
        ]
        lines.append(f"abstained: {', '.join(shares)}")
    lines += level_lines(evaluation.levels)
    if evaluation.unknown:
        lines.append(f"{evaluation.unknown} queries for entities that cannot be found, counted separately")
    if evaluation.auroc is not None:
        interval = format_interval(evaluation.intervals["auroc"], 3)
        lines.append(f"AUROC of known against unknown {evaluation.auroc:.3f} ({interval})")
    if evaluation.auroc_right is not None:
        lines.append(f"AUROC of correct answers against unknown {evaluation.auroc_right:.3f}")
    return "\n".join(lines)


def level_lines(levels: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `summarise_levels` returns as lines of text."""
    if not levels:
        return
    if levels["right"] is not None:
        yield (
            f"levels: {levels['answered']:.1f} % of the queries have one, {levels['right']:.1f} % of these are right "
            f"({format_interval(levels['right_interval'])}), {levels['entities_left']:g} entities left (median)"
        )
    at_90 = levels["at_90_right"]
    ratio = "" if at_90["ratio"] is None else f" ({at_90['ratio']:.2f} times as many)"
    yield (
        f"at 90 % right: {at_90['any']:.1f} % answered at some level, {at_90['entity']:.1f} % with an entity{ratio}; "
        f"{at_90['most_specific']:.1f} % at the most specific level that reaches a threshold"
    )


def format_ratios(ratios: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what `compare` returns as text."""
    parts = (
        f"{name} {each['ratio']:.2f} ({format_interval(each['interval'], 2) or 'no upper bound'})"
        for name, each in ratios.items()
    )
    return ", ".join(parts) or "none without training is right"


def distinct_splits(recall: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return one row for splits of the same queries, under all of their names: a part may be as large as its whole."""
    groups: list[list[str]] = []
    for name, row in recall.items():
        for group in groups:
            part = group[0]
            kind = "unseen" if part.endswith("unseen") else "seen"
            if row["queries"] == recall[part]["queries"] and (name == "all" or (name == kind and part.endswith(kind))):
                group.append(name)
                break
        else:
            groups.append([name])
    return {", ".join(group): recall[group[0]] for group in groups}


def format_interval(interval: object, digits: int = 1) -> str:
    """Return an interval as text, empty if there is none."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}" if isinstance(interval, tuple) else ""
