"""`--base` copies attended words with the embeddings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.config import ExportConfig
from export.pipeline import export_bundle
from index.bundle import Bundle

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


@pytest.fixture
def config(tmp_path: Path, make_catalog: Callable[[Path], CatalogFiles], checkpoint: Path) -> ExportConfig:
    (tmp_path / "catalog").mkdir()
    return ExportConfig(
        catalog=make_catalog(tmp_path / "catalog").path,
        checkpoint=checkpoint,
        out=tmp_path / "first",
        shard_size=10,
        batch_size=4,
        store_text=True,
        thumbnail_px=20,
        device="cpu",
        workers=1,
    )


def test_unchanged_entities_are_copied_with_their_words(config: ExportConfig, tmp_path: Path) -> None:
    export_bundle(config)
    lines = config.catalog.read_text("utf-8").splitlines()
    changed = json.loads(lines[0])
    # The image changes too, because the text of an untrained adaptor has no effect on embeddings.
    lines[0] = json.dumps({**changed, "text": "It flies by night and hums.", "images": changed["images"][::-1]})
    config.catalog.write_text("\n".join(lines) + "\n", "utf-8")

    summary = export_bundle(dataclasses.replace(config, out=tmp_path / "second", base=config.out))
    first, second = Bundle.open(config.out), Bundle.open(tmp_path / "second")
    assert summary.base_fits
    assert 0 < summary.copied_entities < summary.counts.entities
    before, after = first.embeddings(), second.embeddings()
    np.testing.assert_array_equal(before.rows_N, after.rows_N)
    everything = np.arange(len(before))
    same_N = (before.stored(everything) == after.stored(everything)).all(axis=1)
    with first.store() as old, second.store() as new:
        row = old.get(changed["entity_id"]).row
        assert not same_N[before.rows_N == row].any()
        assert same_N[before.rows_N != row].all()
        for other in set(range(len(old))) - {row}:
            entity_id = old.by_rows([other])[0].entity_id
            assert new.get(entity_id) == old.get(entity_id)
            assert new.attended_words(other) == old.attended_words(other)
            assert new.thumbnail(entity_id) == old.thumbnail(entity_id)
        text = new.get(changed["entity_id"]).text or ""
        words = {text[start:end] for start, end, _ in new.attended_words(row)}
        assert words
        assert words <= {"It", "flies", "by", "night", "and", "hums"}


def test_nothing_is_copied_from_a_base_without_texts(config: ExportConfig, tmp_path: Path) -> None:
    without = dataclasses.replace(config, store_text=False)
    export_bundle(without)
    summary = export_bundle(dataclasses.replace(config, out=tmp_path / "second", base=without.out))
    assert not summary.base_fits
    assert summary.copied_entities == 0
    with Bundle.open(tmp_path / "second").store() as store:
        assert any(store.attended_words(row) for row in range(len(store)))
