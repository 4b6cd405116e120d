"""Attended words, computed by hand and in an exported bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.config import ExportConfig
from export.pipeline import export_bundle
from export.staging import MAX_WORDS, find_attended_words
from index.bundle import Bundle
from model.encoders import open_text_encoder


def test_tokens_of_a_word_are_added_and_punctuation_is_ignored() -> None:
    text = "  The okapi, a giraffe's kin."
    spans = [
        (0, 0),
        (2, 5),
        (6, 8),
        (8, 11),
        (11, 12),
        (13, 14),
        (15, 22),
        (22, 23),
        (23, 24),
        (25, 28),
        (28, 29),
        (0, 0),
    ]
    weights = [0.3, 0.01, 0.1, 0.2, 0.05, 0.02, 0.04, 0.01, 0.02, 0.09, 0.06, 0.1]
    words = find_attended_words(text, spans, weights)
    assert [(text[start:end], weight) for start, end, weight in words] == [
        ("okapi", 0.3), ("kin", 0.09), ("giraffe's", 0.07), ("a", 0.02), ("The", 0.01),
    ]  # fmt: skip


def test_the_heaviest_words_come_first_and_equal_ones_in_order() -> None:
    text = " ".join(f"w{number:02d}" for number in range(20))
    spans = [(4 * number, 4 * number + 3) for number in range(20)]
    words = find_attended_words(text, spans, [0.05] * 19 + [0.06])
    assert [text[start:end] for start, end, _ in words] == ["w19", *(f"w{n:02d}" for n in range(MAX_WORDS - 1))]
    assert find_attended_words("", [], []) == ()


@pytest.mark.parametrize("text", ["Okapi: the forest giraffe.", "\n\t élan — 2nd 🦒 word ", "   "])
def test_token_spans_match_the_tokens(text: str) -> None:
    encoder = open_text_encoder("minilm")
    spans = encoder.token_spans([text])[0]
    assert len(spans) == int(encoder.encode([text]).mask_BT.sum())
    pieces = [text[start:end] for start, end in spans if start < end]
    assert "".join(pieces) == "".join(text.split())  # only white space is outside the spans


def test_words_are_stored_only_with_the_text(catalog: Any, checkpoint: Path, tmp_path: Path) -> None:
    bundles = []
    for store_text in (True, False):
        out = tmp_path / f"{store_text}"
        export_bundle(
            ExportConfig(catalog=catalog.path, checkpoint=checkpoint, out=out, limit=7, store_text=store_text)
        )
        bundles.append(Bundle.open(out))
    assert np.array_equal(*(bundle.embeddings().at(np.arange(3)) for bundle in bundles))
    count = 0
    with bundles[0].store() as store, bundles[1].store() as plain:
        for entity in store.by_rows(range(len(store))):
            words = store.attended_words(entity.row)
            assert entity.text is not None
            assert bool(words) == bool(entity.text.strip())
            weights = [weight for _, _, weight in words]
            assert weights == sorted(weights, reverse=True)
            assert sum(weights) <= 1.001
            assert all(entity.text[start:end].strip() for start, end, _ in words)
            assert plain.attended_words(entity.row) == ()
            count += len(words)
    assert count > 0
