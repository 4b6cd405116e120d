"""The pages show the figures of the files that commands wrote (`make figures`)."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docs" / "figures").glob("*.json"))


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / ".ci")
        return importlib.import_module("figures")


def test_pages_show_the_figures_of_the_files(figures: ModuleType) -> None:
    files = figures.read_files()
    old = [path.name for path in figures.PAGES if figures.updated(path.read_text("utf-8"), files) != path.read_text()]
    assert old == [], "figures changed: run `make figures`"


def test_every_comment_that_names_figures_is_understood(figures: ModuleType) -> None:
    """One that the script does not match would never be updated. One that begins a line would end the paragraph."""
    for path in figures.PAGES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*<!--\{", text, re.MULTILINE), path
        assert len(re.findall("<!-- rows", text)) == len(figures.TABLE.findall(text)), path
        assert len(re.findall(r"<!-- ?\{", text)) == text.count("<!--/-->") == len(figures.SPAN.findall(text)), path


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_file_of_figures_says_how_they_were_measured_and_a_page_shows_them(path: Path, figures: ModuleType) -> None:
    file = json.loads(path.read_bytes())
    assert all(file[key] for key in ("hardware", "commit", "date", "command", "figures"))
    pages = "".join(page.read_text(encoding="utf-8") for page in figures.PAGES)
    assert re.search(rf"(<!-- rows: |\{{){path.stem}\[", pages)


def test_changed_figures_change_a_page(figures: ModuleType) -> None:
    page = (
        "It is <!--{a[b]:.1f}-->1.0<!--/--> ms.\n\n<!-- rows: a[c]\n{name}|{row[x]} ({row[y]:.1f})\n-->\n\n"
        "| | x |\n| --- | --- |\n| old | 0 |\n\nThe end.\n"
    )
    rows = {"one": {"x": 1, "y": [1, 2]}, "two": {"x": 2, "y": [2.5, 3]}}
    assert figures.updated(page, {"a": {"b": 2.04, "c": rows}}) == page.replace(">1.0<", ">2.0<").replace(
        "| old | 0 |\n", "| one | 1 (1.0–2.0) |\n| two | 2 (2.5–3.0) |\n"
    )


def test_unknown_figures_are_an_error(figures: ModuleType) -> None:
    with pytest.raises(KeyError):
        figures.updated("<!--{missing[b]}-->1<!--/-->", {})


def test_a_new_result_replaces_the_file_of_its_name(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(figures, "FOLDER", tmp_path / "docs")
    (tmp_path / "docs" / "claim.json").write_text('{"command": "wikiclip bench claim", "transcribed": true}')
    (tmp_path / "claim.json").write_text('{"date": "2026-12-01", "figures": {}}')
    figures.adopt(tmp_path / "claim.json")
    adopted = json.loads((tmp_path / "docs" / "claim.json").read_bytes())
    assert adopted == {"command": "wikiclip bench claim", "date": "2026-12-01", "figures": {}}
