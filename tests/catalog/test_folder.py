"""`wikiclip catalog --folder`: folders and tables of pictures, and everything in them that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from catalog import EntityRecord, read_catalog
from catalog.folder import FolderCatalog, FolderConfig, build_folder_catalog
from core.errors import UserError
from core.lines import Rejected
from imaging import readable_types
from tests.commands import run_wikiclip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(path: Path, seed: int, form: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (seed % 256, seed // 256, 90)).save(path, form)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four images of an owl, two of a fox, one of a bear, in a folder for each."""
    seed = 0
    for name, count in (("Grey owl", 4), ("Fox", 2), ("Bear", 1)):
        for number in range(count):
            seed += 1
            draw(tmp_path / "pictures" / name / f"{number}.png", seed)
    return tmp_path / "pictures"


def build(pictures: Path, **options: Any) -> FolderCatalog:
    return build_folder_catalog(FolderConfig(folder=pictures, out=pictures.parent / "catalog.jsonl", **options))


def rejects(pictures: Path) -> dict[str, str]:
    """The reason of each reject by its record. Fails if one has two."""
    rows = lines(pictures.parent / "rejected.jsonl")
    assert len({row["record"] for row in rows}) == len(rows)
    return {row["record"]: row["reason"] for row in rows}


def test_each_folder_is_an_entity(pictures: Path) -> None:
    (pictures / "Fox" / "Text.TXT").write_text("\ufeffA red animal.\n", encoding="utf-8")
    (pictures / "Bear" / "text.md").write_text("It likes honey.", encoding="utf-8")
    draw(pictures / "Bear" / "polar" / "1.jfif", 77, "JPEG")
    build(pictures)
    records = [each for each in read_catalog(pictures.parent / "catalog.jsonl") if isinstance(each, EntityRecord)]
    assert [(each.entity_id, each.title, each.text, len(each.images)) for each in records] == [
        ("bear", "Bear", "It likes honey.", 1),
        ("bear/polar", "Bear/polar", "Bear/polar", 1),
        ("fox", "Fox", "A red animal.", 2),
        ("grey-owl", "Grey owl", "Grey owl", 4),
    ]
    assert all(Path(image).is_file() for each in records for image in each.images)
    assert not (pictures.parent / "rejected.jsonl").exists()


def test_what_cannot_be_used_is_named_once_and_never_an_error(pictures: Path) -> None:
    draw(pictures / "loose.png", 90)
    draw(pictures / "fox" / "3.png", 91)
    draw(pictures / "Bear" / ".hidden" / "1.png", 92)
    draw(pictures / "me\u0301sange" / "1.png", 93)
    draw(pictures / "m\u00e9sange" / "2.png", 94)
    shutil.copy(pictures / "Fox" / "0.png", pictures / "Fox" / "again.png")
    whole = (pictures / "Bear" / "0.png").read_bytes()
    (pictures / "broken only").mkdir()
    (pictures / "broken only" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "Bear" / "nothing.jpg").write_bytes(b"")
    (pictures / "Bear" / "more.zip").write_bytes(b"PK\3\4 and so on")
    (pictures / "Bear" / "notes.txt").write_text("no picture")
    (pictures / "Bear" / ".DS_Store").write_bytes(b"\0")
    (pictures / "Bear" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40))
    (pictures / "Fox" / "text.txt").write_bytes("Füchsin".encode("latin-1"))
    (pictures / "empty").mkdir()
    (pictures / "Fox" / "gone.png").symlink_to("nowhere.png")
    (pictures / "Fox" / "up").symlink_to("..", target_is_directory=True)
    os.mkfifo(pictures / "Fox" / "pipe.png")
    os.mkdir(os.fsencode(pictures) + b"/caf\xe9")
    found = build(pictures)
    assert [(row["title"], len(row["images"])) for row in found.rows] == [
        ("Bear", 1),
        ("Fox", 3),
        ("Grey owl", 4),
        ("m\u00e9sange", 2),
    ]
    heic = "broken picture" if "image/heic" in readable_types() else "image/heic that cannot be read here"
    assert {record: reason.partition(":")[0] for record, reason in rejects(pictures).items()} == {
        "loose.png": "in no folder of its own",
        "fox": "folder with the name of another",
        "m\u00e9sange": "folder with the name of another",
        "Bear/.hidden": "hidden",
        "Bear/.DS_Store": "hidden",
        "Bear/nothing.jpg": "empty file",
        "Bear/more.zip": "archive",
        "Bear/notes.txt": "not a picture",
        "Bear/phone.heic": heic,
        "broken only/cut.png": "broken picture",
        "broken only": "nothing with a usable picture",
        "empty": "empty folder",
        "Fox/again.png": "copy of a picture",
        "Fox/text.txt": "text that is not UTF-8",
        "Fox/gone.png": "link that leads nowhere",
        "Fox/up": "link to a folder that is read anyway",
        "Fox/pipe.png": "not a file",
        "caf\udce9": "name that is not UTF-8",
    }


def test_other_pictures_of_the_same_names_give_another_catalog(pictures: Path) -> None:
    build(pictures)
    before = (pictures.parent / "catalog.jsonl").read_bytes()
    (pictures.parent / "catalog.jsonl").unlink()
    draw(pictures / "Fox" / "0.png", 99)
    build(pictures)
    assert (pictures.parent / "catalog.jsonl").read_bytes() != before


def test_some_images_become_queries(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "mine" / "catalog.jsonl"
    aside = [argument for name in ("pairs", "test") for argument in ("--set-aside", f"{name}=1")]
    done = run_wikiclip("catalog", "--folder", pictures, "--out", out, *aside)
    assert done.returncode == 0, done.stderr
    assert "3 entities, 4 images; 2 pairs; 1 test" in done.stdout
    assert "test.jsonl lacks 2 image(s)" in done.stdout
    records = [each for each in read_catalog(out) if isinstance(each, EntityRecord)]
    queries = [row for name in ("pairs", "test") for row in lines(out.with_name(f"{name}.jsonl"))]
    assert {row["data_split"] for row in queries} == {"pairs_seen", "test_seen"}
    assert {row["entity_id"] for row in queries} <= {record.entity_id for record in records}
    shown = [(out.parent / row["image"]).resolve() for row in queries]
    shown += [Path(image).resolve() for record in records for image in record.images]
    assert len(set(shown)) == 7
    assert all(path.is_file() for path in shown)


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_tables_from_spreadsheets(pictures: Path, tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [
        ["image", "title", "entity_id", "text", "types"],
        ["Grey owl/0.png", "Strix, the “grey”", "Q1", "It hoots.", "bird|owl"],
        ["./Grey owl/1.png", "", "Q1", "", ""],
        ["Fox/0.png", "Fox", "", "", ""],
        ["", "", "", "", ""],
    ]
    quoted = [delimiter.join(f'"{value}"' if "," in value else value for value in row) for row in rows]
    table = pictures / "table.csv"
    table.write_text("\r\n".join(quoted) + "\r\n", encoding=encoding)
    done = run_wikiclip(
        "catalog", "--folder", pictures, "--table", table, "--out", tmp_path / "catalog.jsonl", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["entities"], report["images"], report["rejected"]) == (2, 3, 4)
    owl, fox = lines(tmp_path / "catalog.jsonl")
    assert (owl["entity_id"], owl["title"], owl["text"]) == ("Q1", "Strix, the “grey”", "It hoots.")
    assert (owl["types"], len(owl["images"])) == (["bird", "owl"], 2)
    assert (fox["entity_id"], fox["text"]) == ("fox", "Fox")
    assert set(rejects(pictures).values()) == {"not in the table"}


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        (["image,title", "Fox/9.png,Fox"], 2, "picture that is not in the folder"),
        (["image,title", "../secret.png,Fox"], 2, "picture that is not in the folder"),
        (["image,title", "notes.txt,Fox"], 2, "not a picture"),
        (["image,title", "Fox/0.png,Fox", "Fox/0.png,Fox"], 3, "picture that was named before: on line 2"),
        (["image,title", "Fox/0.png,"], 2, "row without a title"),
        (["image,title,entity_id", "Fox/0.png,Fox,1", "Fox/1.png,Vixen,1"], 3, "row with another title: entity 1"),
        (["image,title,text", "Fox/0.png,Fox,a", "Fox/1.png,Fox,b"], 3, "row with another text: give entity fox one"),
        (["image,title", "Fox/0.png,Fox, a beast"], 2, "row with more cells than the first line"),
    ],
)
def test_a_bad_row_is_rejected_with_its_line(pictures: Path, rows: list[str], line: int, reason: str) -> None:
    (pictures / "notes.txt").write_text("no image")
    table = pictures.parent / "t.csv"
    table.write_text("\n".join([*rows, "Bear/0.png,Bear" + "," * ("entity_id" in rows[0])]) + "\n")
    found = build(pictures, table=table)
    assert found.rows[-1]["title"] == "Bear"
    (rejected,) = [each for each in found.rejected if each.line]
    assert rejected.line == line
    assert rejected.reason.startswith(reason)


def no_folder(pictures: Path) -> list[str | Path]:
    return ["--folder", pictures / "none"]


def empty_folder(pictures: Path) -> list[str | Path]:
    shutil.rmtree(pictures)
    pictures.mkdir()
    return ["--folder", pictures]


def only_bad_files(pictures: Path) -> list[str | Path]:
    for path in pictures.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    return ["--folder", pictures]


def with_table(*rows: str, encoding: str = "utf-8") -> Callable[[Path], list[str | Path]]:
    def write(pictures: Path) -> list[str | Path]:
        (pictures.parent / "t.csv").write_bytes("\n".join(rows).encode(encoding))
        return ["--folder", pictures, "--table", pictures.parent / "t.csv"]

    return write


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (no_folder, "is not a folder"),
        (empty_folder, "is empty"),
        (only_bad_files, "no picture that can be used: 7 x broken picture (Bear/0.png, ...)"),
        (with_table("image,title"), "no picture that can be used: 7 x not in the table"),
        (with_table("picture,title", "Fox/0.png,Fox"), "has no column image; its first line reads 'picture,title'"),
        (with_table("image,title,colour", "Fox/0.png,Fox,red"), "an unknown column 'colour'"),
        (with_table("image,title", "Fox/0.png,Füchsin", encoding="latin-1"), "is not UTF-8"),
        (lambda pictures: ["--folder", pictures, "--table", pictures / "none.csv"], "none.csv cannot be read"),
        (lambda pictures: ["--folder", pictures, "--content", pictures], "give one of --folder and --content"),
        (lambda pictures: ["--folder", pictures, "--min-links", "3"], "--min-links goes with --content"),
        (lambda pictures: ["--content", pictures, "--table", pictures], "--table goes with --folder"),
        (lambda pictures: ["--folder", pictures, "--set-aside", "test"], "'test' is not NAME=N"),
        (lambda pictures: ["--folder", pictures, "--set-aside", "catalog=1"], "has a name that another file has"),
    ],
)
def test_an_error_is_one_line(
    pictures: Path, tmp_path: Path, prepare: Callable[[Path], list[str | Path]], reason: str
) -> None:
    done = run_wikiclip("catalog", *prepare(pictures), "--out", tmp_path / "out" / "catalog.jsonl")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr
    assert not (tmp_path / "out" / "catalog.jsonl").exists()


def test_an_earlier_catalog_is_not_overwritten(pictures: Path) -> None:
    build(pictures)
    with pytest.raises(UserError, match=r"catalog\.jsonl exists"):
        build(pictures)


def test_a_link_to_pictures_elsewhere_is_followed(pictures: Path, tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere" / "deep" / "1.png", 95)
    (pictures / "Lynx").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "linked").symlink_to(pictures, target_is_directory=True)
    found = build_folder_catalog(FolderConfig(folder=tmp_path / "linked", out=tmp_path / "linked" / "catalog.jsonl"))
    assert [row["title"] for row in found.rows] == ["Bear", "Fox", "Grey owl", "Lynx/deep"]
    records = read_catalog(tmp_path / "linked" / "catalog.jsonl")
    assert all(not isinstance(each, Rejected) and Path(each.images[0]).is_file() for each in records)
