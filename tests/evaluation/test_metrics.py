"""Figures small enough to work out by hand."""

from __future__ import annotations

import pytest

from evaluation.metrics import AnsweredQuery, as_table, harmonic_mean, rank_of, recall_at_k, summarise


def test_rank_counts_from_one_and_is_none_for_a_miss() -> None:
    assert rank_of("b", ["a", "b", "c"]) == 2
    assert rank_of("x", ["a", "b"]) is None
    assert rank_of("x", []) is None


def test_recall_divides_by_the_references() -> None:
    ranks = [1, 3, None, 7]
    assert recall_at_k(ranks, 1) == 25.0
    assert recall_at_k(ranks, 5) == 50.0
    assert recall_at_k(ranks, 10) == 75.0
    assert recall_at_k([], 1) == 0.0


def test_harmonic_mean_is_high_only_where_both_are() -> None:
    assert harmonic_mean(36.8, 27.0) == pytest.approx(31.15, abs=0.01)  # the paper's WikiCLIP-S: 31.1
    assert harmonic_mean(100.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_summary_keeps_seen_and_unseen_apart() -> None:
    answered = [
        AnsweredQuery(data_split="a_seen", seen=True, rank=1),
        AnsweredQuery(data_split="a_seen", seen=True, rank=2),
        AnsweredQuery(data_split="a_unseen", seen=False, rank=1),
        AnsweredQuery(data_split="a_unseen", seen=False, rank=None),
        AnsweredQuery(data_split="a_unseen", seen=False, rank=1),
        AnsweredQuery(data_split="other", seen=None, rank=None),
    ]
    result = summarise(answered, rejected=0)
    assert result.seen == 50.0
    assert result.unseen == pytest.approx(66.67, abs=0.01)
    assert result.hm == pytest.approx(57.14, abs=0.01)
    recalls = {"queries": 6, "recall_at_1": 50.0, "recall_at_5": 66.67, "recall_at_10": 66.67}
    assert result.recall["all"].items() >= recalls.items()
    assert result.recall["a_seen"]["recall_at_5"] == 100.0
    assert result.recall["unseen"].items() >= {"queries": 3, "recall_at_1": 66.67, "recall_at_5": 66.67}.items()


def test_without_unseen_queries_there_is_no_harmonic_mean() -> None:
    result = summarise([AnsweredQuery(data_split="a_seen", seen=True, rank=1)], rejected=0)
    assert result.seen == 100.0
    assert result.unseen is None
    assert result.hm is None


def test_abstentions_and_splits_of_the_same_queries() -> None:
    ranks, abstained = [1, 1, 1, 2, None], [True, False, False, True, None]  # the last image cannot be read
    answered = [
        AnsweredQuery(data_split="a_unseen", seen=False, rank=rank, abstained=flag)
        for rank, flag in zip(ranks, abstained, strict=True)
    ]
    unknown = AnsweredQuery(data_split="a_unseen", seen=False, rank=None, in_catalog=False, abstained=True)
    result = summarise([*answered, unknown], rejected=1)
    assert {name: row["percent"] for name, row in result.abstained.items()} == {
        "all": 50.0, "right": 33.33, "unknown": 100.0
    }  # fmt: skip
    assert result.abstained["unknown"]["interval"] == (20.65, 100.0)
    _, row, *others = as_table(result).splitlines()
    assert row.split()[:4] == ["a_unseen,", "unseen,", "all", "5"]
    assert others[0].startswith("abstained: 50.0 % of all answers (15.0 to 85.0), 33.3 % of right ones (")
    mixed = summarise([*answered, AnsweredQuery(data_split="a_seen", seen=True, rank=1)], rejected=0)
    assert [line.split("  ")[0] for line in as_table(mixed).splitlines()[1:4]] == [
        "a_seen, seen", "a_unseen, unseen", "all"
    ]  # fmt: skip


def test_unknown_queries_count_apart_and_as_wrong_for_ovens_evaluator() -> None:
    answered = [
        AnsweredQuery(data_split="a_seen", seen=True, rank=1, in_catalog_probability=0.9),
        AnsweredQuery(data_split="a_seen", seen=True, rank=None, in_catalog=False, in_catalog_probability=0.2),
        AnsweredQuery(data_split="a_unseen", seen=False, rank=1, in_catalog_probability=0.4),
        AnsweredQuery(data_split="a_unseen", seen=False, rank=None, in_catalog=False, in_catalog_probability=0.5),
    ]
    result = summarise(answered, rejected=0)
    assert (result.queries, result.unknown, result.seen, result.unseen, result.hm) == (4, 2, 100.0, 100.0, 100.0)
    assert result.oven == {"seen": 50.0, "unseen": 50.0, "hm": 50.0}
    assert result.auroc == 0.75  # of four pairs three are in order
