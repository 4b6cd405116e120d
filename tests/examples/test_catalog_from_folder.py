"""The example that writes a catalog from a folder and a table, and its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from catalog import EntityRecord, read_catalog

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "catalog_from_folder.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four images of an owl, two of a fox, one of a bear, in a folder for each."""
    for name, count in (("Grey owl", 4), ("Fox", 2), ("Bear", 1)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (20, 20), (60 * number, len(name), 90))
            image.save(tmp_path / "pictures" / name / f"{number}.png")
    return tmp_path / "pictures"


def write_table(path: Path, *rows: str, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join(rows) + "\n", encoding=encoding)
    return path


def test_folders_are_entities_and_some_images_become_pairs(pictures: Path, tmp_path: Path) -> None:
    done = run(pictures, "--out", tmp_path / "out" / "mine", "--train", "1", "--validation", "1", "--test", "1")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "mine"
    assert "3 entities, 3 images; 2 test, 1 validation, 1 pairs" in done.stdout
    assert "pairs.jsonl lacks 2 image(s)" in done.stdout
    records = list(read_catalog(out / "catalog.jsonl"))
    assert all(isinstance(record, EntityRecord) for record in records)
    assert [record.entity_id for record in records] == ["bear", "fox", "grey-owl"]
    assert all(Path(image).is_file() for record in records for image in record.images)
    files = ("test.jsonl", "validation.jsonl", "pairs.jsonl")
    aside = [(out / row["image"]).resolve() for name in files for row in lines(out / name)]
    assert all(path.is_file() for path in aside)
    in_catalog = [Path(image).resolve() for record in records for image in record.images]
    assert len({*aside, *in_catalog}) == len(aside) + len(in_catalog) == 7


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_tables_from_spreadsheets(pictures: Path, tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [
        ["image", "title", "entity_id", "text", "types"],
        ["Grey owl/0.png", "Strix, the “grey”", "Q1", "It hoots.", "bird|owl"],
        ["Grey owl/1.png", "", "Q1", "", ""],
        ["Fox/0.png", "Fox", "", "", ""],
        ["", "", "", "", ""],
    ]
    quoted = [delimiter.join(f'"{value}"' if "," in value else value for value in row) for row in rows]
    table = write_table(tmp_path / "t.csv", *quoted, encoding=encoding)
    done = run(pictures, "--table", table, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    owl, fox = lines(tmp_path / "catalog.jsonl")
    assert (owl["entity_id"], owl["title"], owl["text"]) == ("Q1", "Strix, the “grey”", "It hoots.")
    assert (owl["types"], len(owl["images"])) == (["bird", "owl"], 2)
    assert (fox["entity_id"], fox["text"]) == ("fox", "")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["picture,title", "Fox/0.png,Fox"], "has no column image; its first line reads 'picture,title'"),
        (["image,title,colour", "Fox/0.png,Fox,red"], "an unknown column 'colour'"),
        (["image,title", "Fox/9.png,Fox"], "line 2: Fox/9.png does not exist"),
        (["image,title", "notes.txt,Fox"], "line 2: notes.txt: "),
        (["image,title", "Fox/0.png,Fox", "Fox/0.png,Fox"], "line 3: Fox/0.png is already named by line 2"),
        (["image,title", "Fox/0.png,"], "line 2: Fox/0.png has no title"),
        (["image,title,entity_id", "Fox/0.png,Fox,1", "Fox/1.png,Vixen,1"], "two titles, 'Fox' and 'Vixen'"),
        (["image,title,text", "Fox/0.png,Fox,a", "Fox/1.png,Fox,b"], "two different values of 'text'"),
        (["image,title", "Fox/0.png,Fox, a beast"], "line 2 of"),
        (["image,title"], "no images in"),
        (["image,title", *(f"{number}.png,Fox" for number in range(9))], "9 image(s) cannot be used"),
    ],
)
def test_an_error_is_one_line(pictures: Path, tmp_path: Path, rows: list[str], reason: str) -> None:
    (pictures / "notes.txt").write_text("no image")
    done = run(pictures, "--table", write_table(tmp_path / "t.csv", *rows), "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["none.csv", "latin.csv"])
def test_an_unreadable_table_is_named(pictures: Path, tmp_path: Path, table: str) -> None:
    (tmp_path / "latin.csv").write_bytes("image,title\nFox/0.png,Füchsin\n".encode("latin-1"))
    done = run(pictures, "--table", tmp_path / table, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert table in done.stderr
