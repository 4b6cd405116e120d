"""The documents build as a site without warnings, and the site loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OTHER_PAGES = (
    "index.md", "changelog.md", "cli.md", "contributing.md", "demo.md", "icon-sets.md", "licences.md", "security.md",
)  # fmt: skip
# What is outside docs/ and in the menu.
SOURCES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY_LICENCES.md")
LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]+src=["'](https?:)?//|<link[^>]+rel=["']?stylesheet[^>]+href=["']https?:"""
)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", config, "--site-dir", site]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_site_has_every_page(site: Path) -> None:
    pages = {f"{path.stem}.html" for path in [*(ROOT / "docs").glob("*.md"), *map(Path, OTHER_PAGES)]}
    assert pages <= {path.name for path in site.glob("*.html")}
    assert "make demo" in (site / "index.html").read_text(encoding="utf-8")
    assert "--queue-limit" in (site / "cli.html").read_text(encoding="utf-8")


def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    assert LOADED.search('<script src="https://example.org/a.js"></script>')
    for page in site.glob("*.html"):
        assert not LOADED.search(page.read_text(encoding="utf-8")), page.name


def test_links_to_files_of_the_repository_lead_to_copies(site: Path) -> None:
    notebook = ROOT / "examples" / "recognise.ipynb"
    assert 'href="repository/examples/recognise.ipynb"' in (site / "tutorial.html").read_text(encoding="utf-8")
    assert (site / "repository" / "examples" / "recognise.ipynb").read_bytes() == notebook.read_bytes()


@pytest.mark.parametrize("link", ["no-such-page.md", "service.md#no-such-part", "../no-such-file.txt"])
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str) -> None:
    for name in ("docs", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in (*SOURCES, "demo", "examples", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "catalog.md").open("a", encoding="utf-8") as page:
        page.write(f"\n[broken]({link})\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert (link.partition("#")[2] or Path(link).name) in done.stderr


def test_the_menu_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"'([\w-]+\.md)'", repr(nav))
    assert sorted(named) == sorted([*(path.name for path in (ROOT / "docs").glob("*.md")), *OTHER_PAGES])
