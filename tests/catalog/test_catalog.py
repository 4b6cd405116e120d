"""Reading catalogs of every format, and rejecting bad records with line and reason."""

from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from catalog import EntityRecord, formats, is_url, read_catalog
from catalog.formats import SeenIds
from core.errors import CatalogError
from core.lines import MAX_LINE_BYTES, Rejected, read_jsonl

FULL = {
    "entity_id": "Q1",
    "title": "Élan",
    "text": "A deer.",
    "images": ["a.png", "sub/b.png", "../c.png", "/abs/d.png", "https://example.org/e.png"],
    "url": "https://en.wikipedia.org/wiki/Moose",
    "types": ["animal"],
    "titles": {"fr": "Élan"},
    "symbol": "🫎",
    "description": "a deer",
}
BARE = {"entity_id": "Q2", "title": "Bare", "url": None, "types": None, "titles": None, "an unknown field": 1}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def records(path: Path, image_root: Path | None = None) -> list[EntityRecord]:
    items = list(read_catalog(path, image_root))
    assert all(isinstance(item, EntityRecord) for item in items), items
    return [item for item in items if isinstance(item, EntityRecord)]


def expected_full(folder: Path) -> EntityRecord:
    return EntityRecord(
        entity_id="Q1",
        title="Élan",
        text="A deer.",
        images=(
            f"{folder}/a.png",
            f"{folder}/sub/b.png",
            f"{folder}/../c.png",
            "/abs/d.png",
            "https://example.org/e.png",
        ),
        url="https://en.wikipedia.org/wiki/Moose",
        types=("animal",),
        titles={"fr": "Élan"},
        symbol="🫎",
        description="a deer",
        line=1,
    )


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "named otherwise"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, [FULL, "", BARE])
    assert records(path) == [expected_full(tmp_path), EntityRecord(entity_id="Q2", title="Bare", line=3)]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([FULL, {**BARE, "text": None, "images": []}])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    full, bare = records(tmp_path / "c.parquet")
    assert full == expected_full(tmp_path)
    assert bare == EntityRecord(entity_id="Q2", title="Bare", line=2)


def test_parquet_with_titles_as_a_map(tmp_path: Path) -> None:
    schema = pyarrow.schema(
        [
            ("entity_id", pyarrow.string()),
            ("title", pyarrow.string()),
            ("titles", pyarrow.map_(pyarrow.string(), pyarrow.string())),
        ]
    )
    rows = [{"entity_id": "Q1", "title": "x", "titles": [("fr", "y")]}, {"entity_id": "Q2", "title": "x", "titles": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "c")
    assert [record.titles for record in records(tmp_path / "c")] == [{"fr": "y"}, {}]


def test_parquet_of_many_batches(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"entity_id": f"Q{n}", "title": "x"} for n in range(3000)])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=700)
    assert [record.entity_id for record in records(tmp_path / "c.parquet")] == [f"Q{n}" for n in range(3000)]


@pytest.mark.parametrize("name", ["Wiki6M_ver_1_0.jsonl", "Wiki6M_ver_1_0.jsonl.gz"])
def test_oven(tmp_path: Path, name: str) -> None:
    rows = [
        {
            "wikidata_id": "Q15083",
            "wikipedia_title": "Reticulated giraffe",
            "wikipedia_summary": "The giraffe.",
            "wikipedia_content": "The giraffe. It is tall.",
            "wikipedia_image_url": "https://example.org/x.jpg",
        },
        {
            "wikidata_id": "Q2",
            "wikipedia_title": "No image",
            "wikipedia_summary": "Summary.",
            "wikipedia_content": "Content.",
            "wikipedia_image_url": None,
        },
    ]
    image = tmp_path / "root/wikipedia_images_full/Q150/Q15083.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"jpeg")
    giraffe, other = records(write_jsonl(tmp_path / name, rows), tmp_path / "root")
    assert giraffe == EntityRecord(
        entity_id="Q15083",
        title="Reticulated giraffe",
        text="The giraffe. It is tall.",
        images=(str(image),),
        url="https://en.wikipedia.org/wiki/Reticulated_giraffe",
        line=1,
    )
    assert (other.images, other.text) == ((), "Summary.\nContent.")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["encyclopedic_kb_wiki.json", "kb.json.gz"])
def test_encyclopedic_vqa(tmp_path: Path, name: str, indent: int | None) -> None:
    url = "https://en.wikipedia.org/wiki/Moose"
    content = {
        url: {
            "title": "Moose",
            "section_titles": ["Moose", "Habitat"],
            "section_texts": ["A deer.", "Woods."],
            "image_urls": ["https://example.org/1.jpg"],
            "url": url,
        },
        "https://en.wikipedia.org/wiki/Untitled": {"title": "", "section_titles": [], "section_texts": []},
        "https://en.wikipedia.org/wiki/List": ["not", 1.5],
    }
    text = json.dumps(content, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    moose, untitled, broken = read_catalog(tmp_path / name)
    assert moose == EntityRecord(
        entity_id=url,
        title="Moose",
        text="Moose\nA deer.\n\nHabitat\nWoods.",
        images=("https://example.org/1.jpg",),
        url=url,
        line=1,
    )
    assert isinstance(untitled, Rejected)
    assert untitled.reason == "`title` is missing or empty"
    assert isinstance(broken, Rejected)
    assert (broken.line, broken.reason) == (3, "expected a JSON object, got list")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"title": "x"}, "`entity_id` is missing or empty"),
        ({"entity_id": " ", "title": "x"}, "`entity_id` is missing or empty"),
        ({"entity_id": 5, "title": "x"}, "`entity_id` must be a string, it is int"),
        ({"entity_id": "Q9"}, "`title` is missing or empty"),
        ({"entity_id": "Q9", "title": ["x"]}, "`title` must be a string, it is list"),
        ({"entity_id": "Q9", "title": "x", "text": {}}, "`text` must be a string, it is dict"),
        ({"entity_id": "Q9", "title": "x", "images": "a.png"}, "`images` must be a list of strings"),
        ({"entity_id": "Q9", "title": "x", "images": [1]}, "`images` must be a list of strings"),
        ({"entity_id": "Q9", "title": "x", "types": {"a": 1}}, "`types` must be a list of strings"),
        ({"entity_id": "Q9", "title": "x", "titles": ["y"]}, "`titles` must be an object"),
        ({"entity_id": "Q9", "title": "x", "titles": {"fr": 1}}, "`titles` must be an object"),
        ({"entity_id": "Q9", "title": "\ud83e"}, "`title` contains a lone surrogate"),
        ({"entity_id": "Q1", "title": "again"}, "entity_id 'Q1' repeats an earlier record"),
        ({"wikidata_id": "", "wikipedia_title": "x"}, "`wikidata_id` is missing or empty"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
        ('{"title": ' + "[" * 900 + "]" * 900 + "}", "`entity_id` is missing"),
        ('{"entity_id": "Q9", "title": "' + "x" * MAX_LINE_BYTES + '"}', "the line is over 16777216 bytes"),
    ],
)
def test_a_bad_record_is_rejected(tmp_path: Path, row: Any, reason: str) -> None:
    first, bad, last = read_catalog(write_jsonl(tmp_path / "c.jsonl", [FULL, row, BARE]))
    assert isinstance(first, EntityRecord)
    assert isinstance(bad, Rejected)
    assert bad.line == 2
    assert reason in bad.reason
    assert len(bad.record) <= 500
    assert isinstance(last, EntityRecord)
    assert last.line == 3


def test_the_id_of_a_rejected_record_can_be_reused(tmp_path: Path) -> None:
    _, second = read_catalog(write_jsonl(tmp_path / "c.jsonl", [{"entity_id": "Q1", "title": ""}, FULL]))
    assert isinstance(second, EntityRecord)


def test_an_empty_catalog_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("")
    assert list(read_catalog(tmp_path / "c.jsonl")) == []


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"none\.jsonl does not exist"):
        list(read_catalog(tmp_path / "none.jsonl"))
    with pytest.raises(CatalogError, match="cannot be read"):
        list(read_catalog(tmp_path))
    (tmp_path / "c.gz").write_text("no gzip")
    with pytest.raises(CatalogError, match="cannot be read"):
        list(read_catalog(tmp_path / "c.gz"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(CatalogError, match="cannot be read to its end: Parquet"):
        list(read_catalog(tmp_path / "c.parquet"))
    (tmp_path / "kb.json").write_text('{"https://x": {"title": "x"}, "https://y": {"ti')
    items = read_catalog(tmp_path / "kb.json")
    assert isinstance(next(items), EntityRecord)
    with pytest.raises(CatalogError, match="cannot be read to its end"):
        next(items)
    (tmp_path / "kb.json").write_text('{"https://x": ' + "[" * 100_000)
    with pytest.raises(CatalogError, match="nested over 100 levels"):
        list(read_catalog(tmp_path / "kb.json"))
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"{}\n")[:10] + b"\xff" * 20)
    with pytest.raises(CatalogError, match="cannot be read after line 0"):
        list(read_jsonl(tmp_path / "c.gz"))


def test_a_line_of_gigabytes_is_one_reject_in_little_memory(tmp_path: Path) -> None:
    """The line has 100 MB, and compressed a few kB."""
    lines = b" " * 100_000_000 + b'\n{"entity_id": "Q1", "title": "x"}\n'
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines, 1))
    (tmp_path / "c.bz2").write_bytes(bz2.compress(lines, 1))
    process = subprocess.run(
        [sys.executable, "-c", _READ_BOTH, tmp_path / "c.jsonl.gz", tmp_path / "c.bz2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rejected, number, last, peak_kb = json.loads(process.stdout)
    assert (rejected, number) == ([1, "the line is over 16777216 bytes"], 2)
    assert last == [2, '{"entity_id": "Q1", "title": "x"}\n']
    assert peak_kb < 110_000


_READ_BOTH = """
import json, re, sys
from pathlib import Path
from core.lines import read_lines
from core.lines import read_jsonl
rejected, (number, _) = read_jsonl(Path(sys.argv[1]))
for line, position in read_lines(Path(sys.argv[2])):
    pass
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([[rejected.line, rejected.reason], number, [position.line, line.decode()], peak_kb]))
"""


def test_a_truncated_gzip_yields_its_first_records(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    rows = [{"entity_id": f"Q{n}", "title": "x", "text": rng.randbytes(200).hex()} for n in range(500)]
    path = write_jsonl(tmp_path / "c.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[:-5000])
    items = read_catalog(path)
    assert isinstance(next(items), EntityRecord)
    with pytest.raises(CatalogError, match="cannot be read after line"):
        list(items)


def test_is_url() -> None:
    assert is_url("https://example.org/x.png")
    assert is_url("HTTP://example.org")
    assert not is_url("images/x.png")
    assert not is_url("/http/x.png")
    assert not is_url("C:/x.png")


def test_an_id_is_new_once() -> None:
    with closing(SeenIds()) as ids:
        assert [ids.add(entity_id) for entity_id in ("Q1", "q1", "Q1", "Ü", "U", "Ü")] == [
            True, True, False, True, True, False,
        ]  # fmt: skip


def test_more_ids_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_SEEN_CACHE_KIB", 64)
    with closing(SeenIds()) as ids:
        assert all(ids.add(f"Q{number}") for number in range(20_000))
        assert not any(ids.add(f"Q{number}") for number in range(0, 20_000, 7))
        assert ids.add("Q20000")
