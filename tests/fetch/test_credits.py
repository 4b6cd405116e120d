"""`wikiclip credits` against a server that answers as MediaWiki's API does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog import EntityRecord, read_catalog
from core.errors import CatalogError, UserError
from fetch.credits import CreditsConfig, add_credits, parse_credit
from fetch.download import FetchLimits

Server = Any  # the class is in conftest.py, which cannot be imported


def image_info(author: str, licence: str = "CC BY-SA 4.0", **facts: str) -> dict[str, Any]:
    facts = {"Artist": author, "LicenseShortName": licence, **facts}
    values = {name: {"value": value, "source": "commons-desc-page"} for name, value in facts.items()}
    return {"descriptionurl": "https://commons.wikimedia.org/wiki/File:X", "extmetadata": values}


@pytest.fixture
def config(tmp_path: Path) -> CreditsConfig:
    return CreditsConfig(
        catalog=tmp_path / "catalog.jsonl",
        out=tmp_path / "credited.jsonl",
        contact="someone@example.org",
        limits=FetchLimits(connections=1, requests_per_s=1e6, retries=2, backoff_s=0.01),
        allow_private=True,
    )


def write_catalog(path: Path, images: list[list[str]], **first: Any) -> None:
    rows = [{"entity_id": f"Q{n}", "title": f"Thing {n}", "images": each} for n, each in enumerate(images)]
    rows[0] |= first
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "bad\n")


def credits_of(path: Path) -> list[tuple[Any, ...]]:
    return [record.image_credits for record in read_catalog(path) if isinstance(record, EntityRecord)]


def test_credits_are_added_and_those_there_are_kept(
    config: CreditsConfig, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = server.url("wiki/Special:FilePath/{}?width=500").format
    server.files = {f"File:N {number}.jpg": image_info(f"Author {number}") for number in range(60)}
    server.files |= {"File:Giraffe (new).jpg": image_info("Zoë"), "File:No facts.jpg": image_info("", "")}
    server.moved_files = {"File:Giraffe & co.jpg": "File:Giraffe (new).jpg"}
    kept = [{"author": "Ann"}, None, None]
    write_catalog(
        tmp_path / "catalog.jsonl",
        [
            [url("Kept.jpg"), url("giraffe_%26_co.jpg"), "local.jpg"],
            ["https://example.org/elsewhere.jpg"],
            [url("Missing.jpg")],
            [url("No_facts.jpg")],
            *([url(f"N_{number}.jpg")] for number in range(60)),
        ],
        image_credits=kept,
    )
    report = add_credits(replace(config, catalog=Path("catalog.jsonl"), out=Path("credited.jsonl")))
    assert (report.images, report.credited, report.requests, report.rejected) == (63, 61, 2, 1)
    credits = credits_of(config.out)
    there = {"licence": "CC BY-SA 4.0", "source": "https://commons.wikimedia.org/wiki/File:X"}
    assert credits[:4] == [({"author": "Ann"}, {"author": "Zoë", **there}, None), (), (), ()]
    assert credits[4:] == [({"author": f"Author {number}", **there},) for number in range(60)]
    first = next(iter(read_catalog(config.out)))
    assert isinstance(first, EntityRecord)
    assert first.images[2] == str(tmp_path / "local.jpg")
    assert len(server.agents) == 1
    assert server.most_active == 1
    # Nothing is left to ask.
    again = add_credits(replace(config, catalog=config.out, out=tmp_path / "again.jsonl.gz"))
    assert (again.images, again.credited) == (2, 0)
    assert credits_of(tmp_path / "again.jsonl.gz") == credits


def test_an_interrupted_run_continues(config: CreditsConfig, server: Server, tmp_path: Path) -> None:
    images = [[server.url(f"wiki/Special:FilePath/N_{number:03d}.jpg")] for number in range(120)]
    write_catalog(config.catalog, images)
    server.files = {f"File:N {number:03d}.jpg": image_info(f"Author {number}") for number in range(0, 120, 20)}
    server.broken_files = {"File:N 070.jpg"}
    with pytest.raises(UserError, match=r"cannot be asked: the server answered 404; run the same command again"):
        add_credits(config)
    assert not config.out.exists()
    server.broken_files = set()
    report = add_credits(config)
    assert (report.images, report.credited, report.requests) == (120, 6, 2)  # two of three batches were left
    assert sum(map(bool, credits_of(config.out))) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalog.jsonl", "credited.jsonl", "rejected.jsonl"]


def test_credits_are_plain_text() -> None:
    hidden = '<span style="display: none;">Unknown author</span>'
    author = f'<a href="https://x.org">Ann &amp;\n <b>Bob</b></a>{hidden}<style>.a {{}}</style>'
    credit = parse_credit(image_info(author, LicenseUrl="//creativecommons.org/licenses/by-sa/4.0"))
    assert credit["author"] == "Ann & Bob"
    assert credit["licence_url"] == "https://creativecommons.org/licenses/by-sa/4.0"
    assert parse_credit(image_info("Ann", Attribution="Ann / Agency"))["author"] == "Ann / Agency"
    assert parse_credit({"descriptionurl": "https://example.org", "extmetadata": []}) == {}


def test_user_errors(config: CreditsConfig, server: Server, tmp_path: Path, catalog_of: Callable[..., Path]) -> None:
    catalog_of(["wiki/Special:FilePath/A.jpg"])
    for match, changes in {
        "is not a contact": {"contact": "me"},
        "must end in": {"out": tmp_path / "c.txt"},
        "exists; choose": {"out": config.catalog},
    }.items():
        with pytest.raises(UserError, match=match):
            add_credits(replace(config, **changes))
    server.files = {"File:A.jpg": {"extmetadata": {"Artist": "no object"}}}
    with pytest.raises(CatalogError, match="does not answer as MediaWiki does: TypeError"):
        add_credits(config)
