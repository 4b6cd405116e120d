"""Every command of the tutorial runs and prints what the page says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.photos import BUILD
from demo.sources import fetch_debian_package

ROOT = Path(__file__).resolve().parents[2]
PageRun = Any  # the dataclass in conftest.py, which no module can import


@pytest.fixture(scope="module")
def tutorial(run_page: Callable[..., PageRun]) -> PageRun:
    """Run the page in a folder that has the package of its photographs, so that 161 MB are downloaded only once."""
    if shutil.which("apt-get") is None:
        pytest.skip("the photographs are from Debian, and apt-get is not installed")
    packages = ROOT / BUILD / "packages"
    fetch_debian_package("tuxpaint-stamps-default", packages)

    def prepare(folder: Path) -> None:
        (folder / BUILD).mkdir(parents=True)
        (folder / BUILD / "packages").symlink_to(packages)

    return run_page("tutorial", prepare)


def first_answers(printed: str) -> list[str]:
    return re.findall(r"^ +1 +[01]\.\d+.*?  ([A-Z].*?)  \[", printed, flags=re.MULTILINE)


def test_the_catalog_is_as_large_as_the_page_says(tutorial: PageRun) -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"prints `(catalog mine/catalog.jsonl: [^`]+)`", page)
    assert said in tutorial.after("wikiclip catalog").splitlines()


def test_photographs_are_recognised(tutorial: PageRun) -> None:
    asked = tutorial.after("wikiclip recognize")
    assert first_answers(asked)[0] == "Giraffe"
    assert first_answers(asked)[-1] == "Flag of Sweden"
    assert re.search(r"^ +1 +[01]\.\d+ +\d\d+ %  ", asked, flags=re.MULTILINE)
    assert re.search(r"demo/example\.jpg   \(probably not in the catalog\)\n +1 +0\.\d+ +[A-Z]", asked)
    evaluated = re.findall(r"^(?:.+, )?all +(\d+) +([\d.]+)", tutorial.after("wikiclip evaluate"), flags=re.MULTILINE)
    assert [queries for queries, _ in evaluated] == ["12", "12", "12"]  # untrained, trained, and compared
    assert min(float(share) for _, share in evaluated) >= 90


def test_the_service_answers_as_the_page_shows(tutorial: PageRun) -> None:
    answer = json.loads(tutorial.after("curl"))
    assert answer["predictions"][0]["entity_id"] == "giraffe"
    assert not answer["abstained"]


def test_what_it_leaves_is_what_it_says(tutorial: PageRun) -> None:
    assert "<html" in (tutorial.folder / "mine" / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in tutorial.folder.iterdir()} >= {"pictures", "pictures-bundle", "mine"}
