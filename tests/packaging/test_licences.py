"""THIRD_PARTY_LICENCES.md lists the packages of the serving image, and all of them have licences that we accept."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements-serving.lock"
# Licences that ask for no more than a notice, and MPL-2.0, which binds only changes to the package itself.
ACCEPTED = re.compile(
    r"0BSD|Apache|(3-Clause )?BSD|CC0|ISC|MIT|MPL-2.0|Mozilla Public License 2.0|PSF-2.0|Python Software|Zlib"
)


@pytest.fixture(scope="module")
def written() -> str:
    page = (ROOT / "THIRD_PARTY_LICENCES.md").read_text(encoding="utf-8")
    return page.partition("<!-- serving licences -->\n")[2]


def test_table_is_up_to_date(written: str) -> None:
    done = subprocess.run([ROOT / ".ci" / "serving-licences"], capture_output=True, text=True, check=True)
    assert written.strip() == done.stdout.strip(), "the locked packages changed: run `make licences`"


def test_table_has_every_locked_package_at_its_version(written: str) -> None:
    rows = re.findall(r"^\| (\S+) +\| (\S+) +\| (.+?) +\| ", written, flags=re.MULTILINE)
    listed = {name.lower().replace("_", "-"): version for name, version, _ in rows}
    pinned = re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert pinned
    assert {name.lower().replace("_", "-"): version for name, version in pinned}.items() <= listed.items()
    refused = [
        name
        for name, _, licence in rows[1:]
        if not all(ACCEPTED.match(term) for term in re.split(r" AND | OR |; ", re.sub(r"[()]", "", licence)))
    ]
    assert refused == []
