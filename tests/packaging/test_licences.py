"""docs/licences.md lists what the serving image installs, and nothing in there has terms that nobody thought of."""

from __future__ import annotations

import re
from email.message import Message
from pathlib import Path

import pytest

from core.errors import UserError
from core.licences import LOCK, MARKERS, PAGE, licence_of, pinned, table

ALLOWED = {
    "0BSD", "Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MIT-CMU", "MPL-2.0",
    "PSF-2.0", "Zlib",
}  # fmt: skip


def listed() -> dict[str, tuple[str, str]]:
    found = re.findall(
        r"^\| ([\w.-]+) \| (\S+) \| (.+?) \| \S* \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    return {name: (number, licence) for name, number, licence in found if name != "---"}


def test_the_page_is_what_the_packages_say() -> None:
    (written,) = MARKERS.findall(PAGE.read_text(encoding="utf-8"))
    assert written == table(), "the locked packages changed: run `make licences`"


def test_every_locked_package_is_listed() -> None:
    assert {name: number for name, (number, _) in listed().items()}.items() >= pinned(LOCK).items()


def test_no_licence_is_unheard_of() -> None:
    for name in pinned(LOCK):
        terms = set(re.split(r" AND | OR | or |[()]", listed()[name][1])) - {""}
        assert terms <= ALLOWED, name


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License-Expression": "MPL-2.0 AND MIT", "License": "other"}, "MPL-2.0 AND MIT"),
        ({"Classifier": "License :: OSI Approved :: MIT License", "License": "see file"}, "MIT"),
        ({"Classifier": "License :: OSI Approved", "License": "ISC\n\nCopyright"}, "ISC"),
        ({"Name": "x"}, "not declared"),
    ],
)
def test_a_licence_is_read_in_this_order(fields: dict[str, str], licence: str) -> None:
    about = Message()
    for name, value in fields.items():
        about[name] = value
    assert licence_of(about) == licence


def test_another_version_than_the_locked_one_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for text, reason in (("click==0.0.1 \\\n", "0.0.1 is locked"), ("no-such-package==1 \\\n", "is not installed")):
        lock.write_text(text)
        with pytest.raises(UserError, match=reason):
            table(lock)
