"""docs/licences.md's table: the packages of the serving image and their licences, from their own metadata.

`python -m core.licences` writes it; the packages are those of requirements-serving.lock, installed in this environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import cast

import click

from core.cli import run
from core.errors import UserError
from core.files import atomic_write_bytes

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements-serving.lock"
PAGE = ROOT / "docs" / "licences.md"
MARKERS = re.compile(r"(?<=<!-- serving licences -->\n).*?(?=<!-- /serving licences -->)", flags=re.DOTALL)
_PIN = re.compile(r"^([\w.-]+)==(\S+)", flags=re.MULTILINE)
# Classifiers name some licences otherwise than SPDX does.
_AS_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def pinned(lock: Path) -> dict[str, str]:
    """Name and version of each package of a lock file."""
    return dict(_PIN.findall(lock.read_text(encoding="utf-8")))


def licence_of(about: Message) -> str:
    """The licence that a package declares: an SPDX expression if it has one, else its classifier, else what it says."""
    if expression := about.get("License-Expression"):
        return expression
    classifiers = [each.rpartition(" :: ")[2] for each in about.get_all("Classifier", []) if each.startswith("License")]
    told = [each for each in classifiers if each != "OSI Approved"] or [about.get("License") or ""]
    first_lines = [each.strip().partition("\n")[0] for each in told]
    named = " or ".join(_AS_SPDX.get(each, each) for each in first_lines if each)
    return named or "not declared"


def rows(lock: Path) -> Iterator[tuple[str, str, str, str]]:
    """Name, version, licence and home of each package. Raises `UserError` where another version is installed."""
    for name, wanted in sorted(pinned(lock).items(), key=lambda pin: pin[0].lower()):
        try:
            installed = version(name)
        except PackageNotFoundError:
            raise UserError(f"{name} is not installed here; run `make setup`, then try again") from None
        if installed != wanted:
            raise UserError(f"{name} {installed} is installed, {wanted} is locked; run `make setup`, then try again")
        about = cast(Message, metadata(name))  # a Protocol that says less than it is
        yield name, wanted, licence_of(about), _home(about)


def _home(about: Message) -> str:
    urls = dict(each.split(", ", 1) for each in about.get_all("Project-URL", []))
    preferred = ("source", "source code", "repository", "homepage", "code", "github")
    found = {label.lower(): url for label, url in urls.items()}
    return next((found[label] for label in preferred if label in found), about.get("Home-page") or "")


def table(lock: Path = LOCK) -> str:
    lines = ["| package | version | licence | where |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {number} | {licence} | {home} |" for name, number, licence, home in rows(lock)]
    return "\n" + "\n".join(lines) + "\n\n"


@click.command()
def main() -> None:
    """Write the table of docs/licences.md anew."""
    page = PAGE.read_text(encoding="utf-8")
    atomic_write_bytes(PAGE, MARKERS.sub(lambda _: table(), page).encode())


if __name__ == "__main__":
    run(main)
