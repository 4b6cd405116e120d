"""`wikiclip catalog` on small dumps in Wikimedia's formats."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from catalog import EntityRecord, joins, read_catalog
from catalog.build import CatalogConfig, CatalogReport, build_catalog
from catalog.dumps import read_page_images
from core.errors import CatalogError, UserError
from core.lines import START, read_lines
from tests.commands import run_wikiclip

Json = dict[str, Any]

PAGE_PROPS_HEAD = """-- MariaDB dump 10.19  Distrib 10.11.6-MariaDB
--
-- Host: db1234    Database: enwiki
-- ------------------------------------------------------
/*!40101 SET NAMES binary */;
DROP TABLE IF EXISTS `page_props`;
CREATE TABLE `page_props` (
  `pp_page` int(8) unsigned NOT NULL,
  `pp_propname` varbinary(60) NOT NULL DEFAULT '',
  `pp_value` blob NOT NULL,
  `pp_sortkey` float DEFAULT NULL,
  PRIMARY KEY (`pp_page`,`pp_propname`)
) ENGINE=InnoDB DEFAULT CHARSET=binary;
LOCK TABLES `page_props` WRITE;
"""


def document(page_id: int, title: str, item: str | None, **fields: Any) -> tuple[Json, Json]:
    """Return the two lines of an article: action and document, with some fields that the catalog ignores."""
    return {"index": {"_id": page_id}}, {
        "wiki": "enwiki",
        "language": "en",
        "namespace": 0,
        "namespace_text": "",
        "title": title,
        "opening_text": f"{title} opens.",
        "text": f"{title} opens. Then it goes on.",
        "incoming_links": 10,
        "popularity_score": 1.5e-5,
        "category": ["Some category"],
        "source_text": "'''wikitext'''",
        "create_timestamp": "2004-01-01T00:00:00Z",
        **({} if item is None else {"wikibase_item": item}),
        **fields,
    }


def write_content(path: Path, documents: Sequence[tuple[Json, Json] | str], streams: int = 1) -> Path:
    """Write a content dump of NDJSON, compressed by its suffix, in `streams` compressed streams."""
    lines = [
        line + "\n"
        for entry in documents
        for line in ([entry] if isinstance(entry, str) else [json.dumps(part, ensure_ascii=False) for part in entry])
    ]
    return write_lines(path, lines, streams)


def write_lines(path: Path, lines: Sequence[str], streams: int = 1) -> Path:
    compress = {".bz2": bz2.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    data = "".join(lines).encode()
    size = -(-len(data) // streams)  # a stream may end in the middle of a line, as with pbzip2
    path.write_bytes(b"".join(compress(data[start : start + size]) for start in range(0, len(data), size)))
    return path


def write_page_props(path: Path, rows: Sequence[tuple[int, str, str]], *, a_line_each: bool = False) -> Path:
    """Write a dump of page_props. Newer dumps have a line per row."""
    values = [f"({page_id},'{name}','{_escaped(value)}',NULL)" for page_id, name, value in rows]
    text = (",\n" if a_line_each else ",").join(values)
    statement = f"INSERT INTO `page_props` VALUES{chr(10) if a_line_each else ' '}{text};\n"
    path.write_bytes(gzip.compress((PAGE_PROPS_HEAD + statement + "UNLOCK TABLES;\n").encode()))
    return path


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')


def statement(property_id: str, value: Any, rank: str = "normal") -> Json:
    """Return a Wikidata statement whose value is an item number, a string or missing."""
    if isinstance(value, int):
        data = {"type": "wikibase-entityid", "value": {"entity-type": "item", "numeric-id": value, "id": f"Q{value}"}}
    else:
        data = {"type": "string", "value": value}
    snak = {"snaktype": "novalue", "property": property_id}
    if value is not None:
        snak = {"snaktype": "value", "property": property_id, "datavalue": data}
    return {"mainsnak": snak, "type": "statement", "id": "x", "rank": rank}


def item(number: int, claims: Sequence[Json] = (), labels: Json | None = None, description: str | None = None) -> Json:
    by_property: dict[str, list[Json]] = {}
    for claim in claims:
        by_property.setdefault(claim["mainsnak"]["property"], []).append(claim)
    texts = {language: {"language": language, "value": text} for language, text in (labels or {}).items()}
    return {
        "type": "item",
        "id": f"Q{number}",
        "labels": texts or [],
        "descriptions": {"en": {"language": "en", "value": description}} if description else [],
        "aliases": [],
        "claims": by_property or [],
        "sitelinks": [],
        "lastrevid": 1,
    }


def write_wikidata(path: Path, entities: Sequence[Json | str], streams: int = 1) -> Path:
    lines = [entity if isinstance(entity, str) else json.dumps(entity, ensure_ascii=False) for entity in entities]
    return write_lines(path, ["[\n", *(f"{line},\n" for line in lines[:-1]), f"{lines[-1]}\n", "]\n"], streams)


TAXON, ANIMAL, MAMMAL, LIST = 16521, 729, 7377, 13406463
GIRAFFE, MOOSE, TOKYO, LISTS = 15083, 35517, 1490, 999
FILE_PATH = "/wiki/Special:FilePath/"

DOCUMENTS = [
    document(10, "Giraffe", f"Q{GIRAFFE}", incoming_links=500),
    document(11, "Moose", f"Q{MOOSE}", opening_text=None, text="A deer.", incoming_links=50),
    document(12, "Tokyo", f"Q{TOKYO}", opening_text="Capital.", text="Hatnote. It is large.", incoming_links=5),
    document(13, 'List of "deer" & co', f"Q{LISTS}"),
    document(14, "Nobody's item", None),
    document(15, "User talk", "Q5", namespace=3),
    document(16, "Girafe", f"Q{GIRAFFE}", wiki="frwiki", language="fr"),
    document(17, "Giraffe again", f"Q{GIRAFFE}"),
    document(18, "Voyage", "Q6", wiki="enwikivoyage"),
    '{"index": {"_id": 19}}',
    '{"title": "cut off',
    '["no object"]',
]
ROWS = [
    (10, "page_image_free", 'Giraffe\'s_\\ "best".jpg'),
    (10, "page_image", "Unfree.jpg"),
    (11, "defaultsort", "(11,'page_image_free','Trap.jpg',NULL)"),
    (12, "page_image", "東京.png"),
    (99, "page_image_free", "Of_no_article.jpg"),
    (13, "wikibase_item", "Q999"),
]
ENTITIES: list[Json | str] = [
    {"type": "property", "id": "P31", "labels": [], "claims": [], "datatype": "wikibase-item"},
    item(ANIMAL, [statement("P279", 1)], {"en": "animal"}),
    item(
        GIRAFFE,
        [statement("P31", TAXON), statement("P31", ANIMAL, "deprecated"), statement("P18", "Giraffe Mikumi.jpg")],
        {"en": "giraffe", "de": "Giraffe"},
        "tall animal",
    ),
    item(
        MOOSE,
        [statement("P31", MAMMAL), statement("P31", LIST, "deprecated"), statement("P18", None)],
        {"mul": "Alces", "fr": "élan"},
    ),
    item(TOKYO, [statement("P31", 515), statement("P31", 4, "preferred"), statement("P18", "東京.png")]),
    item(MAMMAL, [statement("P279", ANIMAL)], {"mul": "mammal"}),
    item(LISTS, [statement("P31", LIST)]),
    item(12345678, [statement("P31", MAMMAL)], {"en": "of no article"}),
    item(LIST, [statement("P279", 2)], {"en": "list"}),
    '{"type": "item", "id": "Q7", "claims": {"P279": [',
]


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> CatalogConfig:
    folder = tmp_path_factory.mktemp("dumps")
    (folder / "content").mkdir()
    write_content(folder / "content" / "enwiki_content-20261101-00000.json.bz2", DOCUMENTS[:5], streams=3)
    write_content(folder / "content" / "enwiki_content-20261101-00001.json.bz2", DOCUMENTS[5:])
    return CatalogConfig(
        content=(folder / "content",),
        page_props=(write_page_props(folder / "enwiki-20261101-page_props.sql.gz", ROWS),),
        wikidata=write_wikidata(folder / "latest-all.json.gz", ENTITIES, streams=2),
        titles=("de", "fr"),
        out=folder / "unused.jsonl",
    )


def build(config: CatalogConfig, out: Path, **changes: Any) -> tuple[CatalogReport, dict[str, EntityRecord]]:
    report = build_catalog(replace(config, out=out, **changes))
    records: dict[str, EntityRecord] = {}
    for record in read_catalog(out):
        assert isinstance(record, EntityRecord), record
        records[record.entity_id] = record
    return report, records


def test_three_dumps_become_one_catalog(dumps: CatalogConfig, tmp_path: Path) -> None:
    report, records = build(dumps, tmp_path / "c.jsonl")
    english = "https://en.wikipedia.org"
    assert list(records.values()) == [
        EntityRecord(
            entity_id="Q15083",
            title="Giraffe",
            text="Giraffe opens. Then it goes on.",
            images=(
                f"{english}{FILE_PATH}Giraffe%27s_%5C_%22best%22.jpg?width=500",
                f"https://commons.wikimedia.org{FILE_PATH}Giraffe_Mikumi.jpg?width=500",
            ),
            url=f"{english}/wiki/Giraffe",
            types=("Q16521",),
            titles={"de": "Giraffe"},
            description="tall animal",
            line=1,
        ),
        EntityRecord(
            entity_id="Q35517",
            title="Moose",
            text="A deer.",
            url=f"{english}/wiki/Moose",
            types=("mammal",),
            titles={"de": "Alces", "fr": "élan"},
            line=2,
        ),
        EntityRecord(
            entity_id="Q1490",
            title="Tokyo",
            text="Capital.\nHatnote. It is large.",
            images=(f"{english}{FILE_PATH}%E6%9D%B1%E4%BA%AC.png?width=500",),
            url=f"{english}/wiki/Tokyo",
            types=("Q4",),
            line=3,
        ),
    ]
    assert (report.documents, report.entities, report.with_image, report.with_text) == (11, 3, 2, 3)
    assert report.left_out == {
        "about the same entity as an earlier document": 2,
        "no Wikidata item": 1,
        "not in the article namespace": 1,
        "of an excluded type": 1,
    }
    rejects = [json.loads(line)["reason"] for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert report.rejected == len(rejects) == 4
    content = "enwiki_content-20261101-00001.json.bz2"
    assert rejects[0] == f"{content}: enwikivoyage is not a Wikipedia"
    assert rejects[1].startswith(f"{content}: not JSON")
    assert rejects[2] == f"{content}: expected a JSON object, got list"
    assert rejects[3].startswith("latest-all.json.gz: not JSON")
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["c.jsonl", "c.jsonl.report.json", "c.jsonl.types.jsonl", "rejected.jsonl"]
    assert _types(tmp_path / "c.jsonl.types.jsonl") == {
        "Q1": ("Q1", []),
        "Q2": ("Q2", []),
        "Q4": ("Q4", []),
        f"Q{ANIMAL}": ("animal", ["Q1"]),
        f"Q{MAMMAL}": ("mammal", [f"Q{ANIMAL}"]),
        f"Q{TAXON}": (f"Q{TAXON}", []),
        f"Q{LIST}": ("list", ["Q2"]),
    }


def _types(path: Path) -> dict[str, tuple[str, list[str]]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["type"]: (row["label"], row["parents"]) for row in rows}


def test_taxa_and_classes_have_their_parents_as_types_even_in_a_cycle(tmp_path: Path) -> None:
    """A kingfisher is found below `bird`, and two classes with one label are not confused."""
    kingfisher, genus, family, bird, river_bank, bank, finance, shore = range(101, 109)
    config = CatalogConfig(
        content=(
            write_content(
                tmp_path / "enwiki_content.json",
                [document(1, "Kingfisher", f"Q{kingfisher}"), document(2, "A bank", "Q1"), document(3, "B bank", "Q2")],
            ),
        ),
        wikidata=write_wikidata(
            tmp_path / "latest-all.json.gz",
            [
                item(kingfisher, [statement("P31", TAXON), statement("P171", genus), statement("P279", finance)]),
                item(genus, [statement("P171", family)], {"en": "Alcedo"}),
                item(family, [statement("P171", bird), statement("P171", genus)], {"en": "Alcedinidae"}),
                item(bird, [statement("P171", family), statement("P171", None)], {"en": "bird"}),
                item(1, [statement("P31", bank)]),
                item(2, [statement("P31", river_bank)]),
                item(bank, [statement("P279", finance)], {"en": "bank"}),
                item(river_bank, [statement("P279", shore)], {"en": "bank"}),
                item(9, [statement("P279", bank)], {"en": "of no use"}),
            ],
        ),
        out=tmp_path / "c.jsonl",
    )
    _, records = build(config, config.out)
    assert records["Q101"].types == (f"Q{TAXON}", f"Q{finance}", "Alcedo")
    assert (records["Q1"].types, records["Q2"].types) == ((f"bank (Q{bank})",), (f"bank (Q{river_bank})",))
    assert _types(tmp_path / "c.jsonl.types.jsonl") == {
        f"Q{genus}": ("Alcedo", [f"Q{family}"]),
        f"Q{family}": ("Alcedinidae", [f"Q{genus}", f"Q{bird}"]),
        f"Q{bird}": ("bird", [f"Q{family}"]),
        f"Q{river_bank}": (f"bank (Q{river_bank})", [f"Q{shore}"]),
        f"Q{bank}": (f"bank (Q{bank})", [f"Q{finance}"]),
        **{f"Q{each}": (f"Q{each}", []) for each in (finance, shore, TAXON)},
    }
    _, birds = build(config, tmp_path / "birds.jsonl", types=(bird,))
    assert list(birds) == ["Q101"]
    _, again = build(config, tmp_path / "again.jsonl", wikidata=None, base=config.out)
    assert again == records
    assert _types(tmp_path / "again.jsonl.types.jsonl") == _types(tmp_path / "c.jsonl.types.jsonl")


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.parquet"])
def test_every_format_holds_the_same(dumps: CatalogConfig, tmp_path: Path, name: str) -> None:
    _, plain = build(dumps, tmp_path / "plain.jsonl")
    _, records = build(dumps, tmp_path / name)
    assert records == plain
    first = (tmp_path / name).read_bytes()
    (tmp_path / "again").mkdir()
    build(dumps, tmp_path / "again" / name)
    assert (tmp_path / "again" / name).read_bytes() == first


@pytest.mark.parametrize(
    ("filters", "expected", "reason"),
    [
        ({"language": "fr"}, {"Q15083"}, "the language is not fr"),
        ({"language": "en", "min_links": 6}, {"Q15083", "Q35517"}, "fewer than 6 links to it"),
        ({"types": (ANIMAL,)}, {"Q35517"}, "of none of the requested types"),  # a mammal is an animal
        ({"types": (TAXON, 4)}, {"Q15083", "Q1490"}, "of none of the requested types"),
        ({"without_types": (ANIMAL,)}, {"Q15083", "Q1490", "Q999"}, "of an excluded type"),
    ],
)
def test_filters(
    dumps: CatalogConfig, tmp_path: Path, filters: dict[str, Any], expected: set[str], reason: str
) -> None:
    report, records = build(dumps, tmp_path / "c.jsonl", **filters)
    assert set(records) == expected
    assert report.left_out[reason] > 0
    assert report.documents == 11


def test_content_alone_is_enough(dumps: CatalogConfig, tmp_path: Path) -> None:
    report, records = build(dumps, tmp_path / "c.jsonl", page_props=(), wikidata=None, max_text=5)
    assert set(records) == {"Q15083", "Q35517", "Q1490", "Q999"}
    assert {record.text for record in records.values()} == {"Giraf", "A dee", "Capit", "List "}
    assert records["Q999"].url == "https://en.wikipedia.org/wiki/List_of_%22deer%22_%26_co"
    assert report.with_image == 0


def test_only_free_images(dumps: CatalogConfig, tmp_path: Path) -> None:
    _, records = build(dumps, tmp_path / "c.jsonl", wikidata=None, free_images=True, image_width_px=0)
    assert [len(record.images) for record in records.values()] == [1, 0, 0, 0]
    assert records["Q15083"].images[0].endswith(".jpg")


def test_older_layouts_are_read(dumps: CatalogConfig, tmp_path: Path) -> None:
    older = [({"index": {"_type": "page", "_id": str(action["index"]["_id"])}}, body) for action, body in DOCUMENTS[:4]]
    content = write_content(tmp_path / "enwiki-20251229-cirrussearch-content.json.gz", older)
    page_props = write_page_props(tmp_path / "props.sql.gz", ROWS, a_line_each=True)
    _, expected = build(dumps, tmp_path / "new.jsonl")
    _, records = build(dumps, tmp_path / "old.jsonl", content=(content,), page_props=(page_props,))
    assert records == expected


def test_a_later_dump_updates_an_earlier_catalog(dumps: CatalogConfig, tmp_path: Path) -> None:
    _, earlier = build(dumps, tmp_path / "earlier.jsonl.gz")
    later = [
        document(20, "Okapi", "Q82037"),
        document(12, "Tokyo", f"Q{TOKYO}", text="Rewritten."),
        *DOCUMENTS[:1],
    ]
    content = write_content(tmp_path / "later.json.bz2", later)
    # Images and items are copied from the base, because their dumps are left out.
    report, records = build(
        dumps, tmp_path / "later.jsonl", content=(content,), page_props=(), wikidata=None,
        base=tmp_path / "earlier.jsonl.gz",
    )  # fmt: skip
    assert report.against_base == {"unchanged": 1, "changed": 1, "added": 1, "removed": 1}
    assert list(records) == ["Q15083", "Q1490", "Q82037"]  # the base's order first
    assert records["Q15083"] == earlier["Q15083"]
    assert records["Q1490"].text == "Tokyo opens.\nRewritten."
    assert records["Q1490"].images == earlier["Q1490"].images
    # Images that stay keep their credits.
    lines = [json.loads(line) for line in gzip.decompress((tmp_path / "earlier.jsonl.gz").read_bytes()).splitlines()]
    lines[0]["image_credits"] = [None, {"author": "Ann", "licence": "CC0", "unknown": 1}]
    (tmp_path / "credited.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for changes in ({"page_props": ()}, {}):
        name = f"keeps{len(changes)}.parquet"
        _, kept = build(dumps, tmp_path / name, base=tmp_path / "credited.jsonl", **changes)
        assert kept["Q15083"].images == earlier["Q15083"].images
        assert kept["Q15083"].image_credits == (None, {"author": "Ann", "licence": "CC0"})
        assert kept["Q1490"].image_credits == ()
    # With all dumps, nothing is copied from the base.
    report, records = build(dumps, tmp_path / "all.jsonl", base=tmp_path / "later.jsonl")
    assert list(records) == ["Q15083", "Q1490", "Q35517"]
    assert report.against_base == {"unchanged": 1, "changed": 1, "added": 1, "removed": 1}
    assert {**records["Q35517"].__dict__, "line": 2} == earlier["Q35517"].__dict__


def many(count: int) -> tuple[list[tuple[Json, Json]], list[tuple[int, str, str]], list[Json | str]]:
    numbers = range(1, count + 1)
    return (
        [document(page, f"Thing {page}", f"Q{page}" if page % 7 else None) for page in numbers],
        [(page, "page_image_free", f"Thing {page}.jpg") for page in numbers],
        [item(page, [statement("P31", count + page % 3)], {"de": f"Ding {page}"}) for page in reversed(numbers)],
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> CatalogConfig:
    """Dumps large enough for several commits each."""
    folder = tmp_path_factory.mktemp("large")
    documents, rows, entities = many(9_000)
    return CatalogConfig(
        content=(
            write_content(folder / "enwiki_content-1-00000.json.bz2", documents[:4_500], streams=7),
            write_content(folder / "enwiki_content-1-00001.json.bz2", documents[4_500:]),
        ),
        page_props=(write_page_props(folder / "props.sql.gz", rows, a_line_each=True),),
        wikidata=write_wikidata(folder / "all.json.bz2", entities, streams=5),
        titles=("de",),
        out=folder / "uninterrupted.jsonl",
    )


def test_a_killed_build_resumes_with_the_same_bytes(large: CatalogConfig, tmp_path: Path) -> None:
    build_catalog(large)
    out = tmp_path / "uninterrupted.jsonl"
    command = [
        Path(sys.executable).with_name("wikiclip"), "catalog", "--resume", "--out", out, "--titles", "de",
        "--page-props", large.page_props[0], "--wikidata", str(large.wikidata),
        *(word for path in large.content for word in ("--content", path)),
    ]  # fmt: skip
    work = tmp_path / ".uninterrupted.jsonl.work"
    seen = []
    for source in ("content enwiki_content-1-00000.json.bz2", "page props props.sql.gz", "wikidata all.json.bz2"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_read(work, source, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        seen.append(lines_read(work))
        assert not out.exists()
    assert seen == sorted(seen)
    assert seen[-1] > seen[0]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7715 entities of 9000 documents" in done.stdout
    assert out.read_bytes() == large.out.read_bytes()
    assert not work.exists()
    again = subprocess.run([*command, "--json"], check=False, capture_output=True, text=True)
    assert json.loads(again.stdout)["entities"] == 7715  # already complete


def lines_read(work: Path) -> int:
    """Return the number of lines read according to a work file whose process is dead. 0 if nothing was committed."""
    with closing(sqlite3.connect(work)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            return 0  # the process was killed between writing its first transaction and committing it
        (count,) = db.execute("SELECT COALESCE(SUM(line), 0) FROM progress").fetchone()
    return int(count)


def wait_until_read(work: Path, source: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until rows that name a source are written. The work file is locked, so this searches its bytes."""
    deadline = time.monotonic() + 60
    wal = work.with_name(work.name + "-wal")
    while not any(path.exists() and source.encode() in path.read_bytes() for path in (work, wal)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("suffix", ["json", "gz", "bz2"])
def test_reading_resumes_after_any_line(tmp_path: Path, suffix: str) -> None:
    numbers = random.Random(3)
    lines = ["x" * numbers.randrange(2000) + "\n" for _ in range(1000)] + ["the last without an end"]
    path = write_lines(tmp_path / f"lines.{suffix}", lines, streams=4)
    read = list(read_lines(path))
    assert [line.decode() for line, _ in read] == lines
    assert [position.line for _, position in read] == list(range(1, 1002))
    for index in (0, 1, 249, 500, 501, 998, 999):
        rest = list(read_lines(path, read[index][1]))
        assert rest == read[index + 1 :], index
    offsets = {position.offset for _, position in read}
    assert len(offsets) == (4 if suffix != "json" else -(-path.stat().st_size // (1 << 18)))


@pytest.mark.parametrize("suffix", ["gz", "bz2"])
def test_a_truncated_file_is_reported(tmp_path: Path, suffix: str) -> None:
    path = write_lines(tmp_path / f"lines.{suffix}", ["line\n"] * 1000)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CatalogError, match="download it again"):
        list(read_lines(path))


def test_a_build_resumes_after_a_damaged_file_is_replaced(dumps: CatalogConfig, tmp_path: Path) -> None:
    whole = dumps.wikidata
    assert whole is not None
    damaged = tmp_path / whole.name
    damaged.write_bytes(whole.read_bytes()[:-20].ljust(whole.stat().st_size, b"?"))
    with pytest.raises(CatalogError, match=r"latest-all\.json\.gz cannot be read after line \d+"):
        build(dumps, tmp_path / "c.jsonl", wikidata=damaged)
    damaged.write_bytes(whole.read_bytes())
    report, _ = build(dumps, tmp_path / "c.jsonl", wikidata=damaged, resume=True)
    assert report.entities == 3


def test_a_full_disk_is_reported_and_the_build_resumes(
    large: CatalogConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catalog.joins._SCHEMA", f"{joins._SCHEMA}; PRAGMA max_page_count = 100")
    with pytest.raises(UserError, match="is full; free some space"):
        build(large, tmp_path / "c.jsonl")
    assert lines_read(tmp_path / ".c.jsonl.work") > 0
    report, _ = build(large, tmp_path / "c.jsonl", resume=True)
    assert report.documents == 9_000


def test_numbers_too_large_for_the_work_file_are_rejected(dumps: CatalogConfig, tmp_path: Path) -> None:
    huge = 10**30
    content = write_content(
        tmp_path / "content.json", [*DOCUMENTS[:2], ({"index": {"_id": str(huge)}}, DOCUMENTS[2][1]), DOCUMENTS[3]]
    )
    entities = [*ENTITIES[:-1], item(huge, [statement("P279", 1)]), item(GIRAFFE, [statement("P279", huge)])]
    wikidata = write_wikidata(tmp_path / "wikidata.json", entities)
    report, found = build(dumps, tmp_path / "c.jsonl", content=(content,), wikidata=wikidata)
    assert (report.rejected, len(found)) == (3, 2)


def test_escapes_in_sql(tmp_path: Path) -> None:
    path = tmp_path / "p.sql"
    path.write_bytes(
        b"INSERT INTO `page_props` VALUES (1,'page_image_free','a\\'b\\\\',0.5),(2,'page_image','\\n\\Z')\n"
    )
    ((images, _),) = read_page_images(path, START, lambda count: None)
    assert images == [(1, True, "a'b\\"), (2, False, "\n\x1a")]


def test_user_errors(dumps: CatalogConfig, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"

    def refused(kind: type[UserError], match: str, **changes: Any) -> None:
        with pytest.raises(kind, match=match) as raised:
            build(dumps, changes.pop("out", out), **changes)
        assert "\n" not in str(raised.value)

    refused(UserError, "must end in", out=tmp_path / "c.txt")
    refused(UserError, "folder of --out", out=tmp_path / "nowhere" / "c.jsonl")
    refused(CatalogError, "does not exist", content=(tmp_path / "no.json",))
    refused(CatalogError, "has no .json", content=(tmp_path,))
    refused(CatalogError, "is a Wikidata dump, .* give it as --wikidata", page_props=(dumps.wikidata,))
    refused(CatalogError, "is a CirrusSearch dump, .* give it as --content", wikidata=next(dumps.content[0].iterdir()))
    (tmp_path / "mixed").mkdir()
    assert dumps.wikidata is not None
    os.link(dumps.wikidata, tmp_path / "mixed" / "latest-all.json.gz")
    refused(CatalogError, "is a Wikidata dump, .* give it as --wikidata", content=(tmp_path / "mixed",))
    os.link(dumps.page_props[0], tmp_path / "props.json.gz")
    refused(CatalogError, "is a page_props dump, .* give it as --page-props", content=(tmp_path / "props.json.gz",))
    xml = write_lines(tmp_path / "pages.json.bz2", ['<mediawiki xmlns="x">\n', "<page>\n"])
    refused(CatalogError, "that no option takes, .* --content takes a CirrusSearch dump", content=(xml,))
    xml.write_bytes(b"no dump")
    refused(CatalogError, "is not a page_props dump", page_props=(xml,))
    (tmp_path / ".c.jsonl.work").unlink()
    refused(UserError, "need --wikidata", types=(1,), wikidata=None)
    refused(UserError, "give each once", content=(*dumps.content, *dumps.content))
    refused(CatalogError, "no document became an entity", min_links=10_000)
    refused(UserError, "finish it with --resume")
    refused(UserError, "another min links", resume=True)
    (tmp_path / ".c.jsonl.work").unlink()
    build(dumps, out)
    refused(UserError, "exists")
    refused(UserError, "made with other settings", resume=True, min_links=1)


def test_one_process_at_a_time(dumps: CatalogConfig, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / ".c.jsonl.work", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="another process is working"):
        build(dumps, tmp_path / "c.jsonl", resume=True)
    holder.close()


def test_the_command_prints_a_summary(dumps: CatalogConfig, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    done = run_wikiclip("catalog", "--content", dumps.content[0], "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"catalog {out}: 4 entities of 11 documents" in done.stdout
    assert "left out: 1 no Wikidata item" in done.stdout
    assert f"3 record(s) rejected, see {tmp_path / 'rejected.jsonl'}" in done.stdout
    done = run_wikiclip("catalog", "--content", out, "--out", out, "--types", "taxon")
    assert done.returncode == 2
    assert "taxon is not a Wikidata item" in done.stderr
