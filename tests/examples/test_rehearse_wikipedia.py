"""Every command of docs/wikipedia.md runs on made-up dumps, and what it makes can be served."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from catalog import EntityRecord, read_catalog
from index.bundle import Bundle
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Recognition, RecognizeOptions

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rehearse_wikipedia.py"


def test_the_commands_of_the_page_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLE))
    names = [words[1] for words in example["commands"]()]
    assert names[:8] == ["catalog", "fetch-images", "credits", "train", "export", "export", "export", "index"]
    assert names[8:] == ["inspect", "serve", "catalog", "fetch-images", "credits", "export", "index"]
    example["rehearse"](tmp_path, 60)
    printed = capsys.readouterr()
    # 60 articles, of which one is a disambiguation page; every third has an image, every ninth two.
    assert "59 entities of 60 documents, 20 with an image" in printed.out
    assert "27 images fetched" in printed.out
    assert "27 of 27 images have an author or a licence" in printed.out
    assert "drew 10 of 20 entities with an image" in printed.err
    # The later dump has five new articles, five less, and one was rewritten.
    assert "compared with the base: 53 unchanged, 1 changed, 5 added, 5 removed" in printed.out
    assert "3 images fetched" in printed.out
    assert "53 entities copied from" in printed.out
    entities = {
        record.entity_id: record
        for record in read_catalog(tmp_path / "later-credited.jsonl.gz")
        if isinstance(record, EntityRecord)
    }
    assert all(len(entity.image_credits) == len(entity.images) for entity in entities.values())
    assert Bundle.open(tmp_path / "later-bundle", verify="full").manifest.counts.entities == len(entities) == 59
    settings = Settings(threads=1)
    with Recognizer.open(tmp_path / "untrained", settings) as recognizer:
        (answer,) = recognizer.recognize_many([example["draw"]("Thing_33.jpg")], RecognizeOptions(top_k=1))
        assert isinstance(answer, Recognition)
        assert answer.predictions[0].entity_id == "Q1033"
    with Recognizer.open(tmp_path / "later-bundle", settings) as recognizer, recognizer.acquire() as held:
        assert held.entities.get("Q1060").image_credits == (
            {
                "author": "Author of File:Thing 60.jpg",
                "licence": "CC BY-SA 4.0",
                "source": "https://commons.wikimedia.org/wiki/File:Thing_60.jpg",
            },
        )
