"""Icons of some hundred artists: from them the image encoder learns that one thing may be drawn in many ways.

All sets of Iconify whose licence lets anybody use and change them, but those that Symbols is made of, and any by an
artist who is held out. What icons of several artists are called alike is taken to be the same thing. Where that is the
name of a seen entity of Symbols its icons are more drawings of that entity, to train with only: they stand in no
catalog. What is called as an unseen entity is left out.

`python -m demo.icons` writes whose icons they are, with licences, to `demo/icon_sets.md`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from core.files import atomic_write_bytes
from demo.build import BUILD, Drawing, read_drawings, render_missing
from demo.entities import slug
from demo.sources import ICON_SETS, IconSet, fetch_package

PACKAGE, VERSION = "@iconify/json", "2.2.535"
ROLE = "icon"
TABLE = Path(__file__).parent / "icon_sets.md"

LICENCES = ("MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "MPL-2.0", "OFL-1.1", "CC-BY-4.0", "CC0-1.0", "Unlicense")
# Sets of artists whose drawings are queries or only the adaptor's, and sets that move.
_LEFT_OUT = re.compile(
    r"(emojione|devicon|flagpack|streamline-emojis|material-icon-theme).*|cif|line-md|svg-spinners|meteocons"
)
_FAMILIES, _OF_FAMILY, _OF_NAME = 3, 3, 10  # so many artists at least; drawings by each, and in all, at most
_SVG_CHARS = 20_150  # more is a picture, not an icon
_SEED = 5

# Words at the end of a name that say how something is drawn, and before it, what sort of thing it is.
_HOW = {
    "outline", "outlined", "line", "lined", "linear", "fill", "filled", "solid", "bold", "duotone", "thin",
    "light", "regular", "broken", "twotone", "rounded", "round", "sharp", "flat", "color", "colored", "mono",
    "icon", "black", "duo", "two", "tone", "logo", "brand", "glyph", "remix", "bulk", "16", "20", "24", "32",
    "48", "12", "28", "96", "1", "dark", "wordmark", "original", "plain", "variants", "static", "16px", "24px",
    "48px", "semibold", "medium", "baseline", "o", "alt", "zz",
}  # fmt: skip
_SORT = {
    "logo", "brand", "outline", "baseline", "twotone", "round", "sharp", "fill", "solid", "emoji", "animal",
    "food", "fruit", "icon",
}  # fmt: skip


def fetch_icons(sources: Path) -> Path:
    """Download and unpack the icons, 104 MB, if they are not there. Raises as `fetch_package` does."""
    fetch_package(PACKAGE, VERSION, sources)
    return sources / PACKAGE


def thing(name: str) -> str:
    """What an icon's name says that it shows: `logo-github-fill` and `github-16` are both `github`."""
    words = re.split(r"[-_:]", name.lower())
    while len(words) > 1 and words[-1] in _HOW:
        words.pop()
    while len(words) > 1 and words[0] in _SORT:
        words.pop(0)
    return "-".join(words)


def plan_icons(icons: Path, drawings: Iterable[Drawing], titles: Mapping[str, str]) -> list[Drawing]:
    """The icons to train with, `entity_id` being that of an entity of Symbols or `icon:NAME`.

    `drawings` are those of Symbols, `titles` the titles of its entities. Always the same for the same package.
    """
    seen: dict[str, set[str]] = {}
    unseen: set[str] = set()
    names = {entity_id: thing(slug(title)) for entity_id, title in titles.items()}
    for drawing in drawings:
        for name in {thing(drawing.icon), names.get(drawing.entity_id, "")} - {""}:
            if drawing.split.endswith("unseen"):
                unseen.add(name)
            else:
                seen.setdefault(name, set()).add(drawing.entity_id)
    chance = random.Random(_SEED)
    planned: dict[str, list[Drawing]] = {}  # an entity that several names fit has the icons of the last
    for name, found in _by_thing(icons).items():
        entities = seen.get(name, set())
        families = {family for family, *_ in found}
        too_few = len(families) < (1 if entities else _FAMILIES)
        if name in unseen or len(name) < 2 or name.isdigit() or len(entities) > 1 or too_few:
            continue
        entity_id = next(iter(entities), f"icon:{name}")
        planned[entity_id] = [_drawing(entity_id, artist, icon) for artist, icon in _chosen(found, chance)]
    return [drawing for mine in planned.values() for drawing in mine]


def _by_thing(icons: Path) -> dict[str, list[tuple[str, str, str, bool]]]:
    """What is drawn: by which family of sets, in which set, under which name, and whether in colours."""
    collections: dict[str, dict[str, Any]] = json.loads((icons / "collections.json").read_bytes())
    things: dict[str, list[tuple[str, str, str, bool]]] = {}
    for artist, about in collections.items():
        free = about["license"].get("spdx") in LICENCES
        if free and artist not in ICON_SETS and not _LEFT_OUT.fullmatch(artist):
            icon_set = IconSet(icons / "json" / f"{artist}.json")
            family, in_colour = artist.partition("-")[0], bool(about.get("palette"))
            for name in icon_set.names:
                if len(icon_set.svg(name)) <= _SVG_CHARS:
                    things.setdefault(thing(name), []).append((family, artist, name, in_colour))
    return things


def _chosen(found: list[tuple[str, str, str, bool]], chance: random.Random) -> list[tuple[str, str]]:
    """Set and name of some drawings of a thing: one of each family, then a second, those in colours before others."""
    chance.shuffle(found)
    by_family: dict[str, list[tuple[str, str]]] = {}
    for family, artist, name, _ in sorted(found, key=lambda each: not each[3]):
        by_family.setdefault(family, []).append((artist, name))
    in_turn = [mine[place] for place in range(_OF_FAMILY) for mine in by_family.values() if place < len(mine)]
    return in_turn[:_OF_NAME]


def _drawing(entity_id: str, artist: str, icon: str) -> Drawing:
    return Drawing(
        entity_id=entity_id, kind="icon", artist=artist, icon=icon, image=f"icons/{artist}/{icon}.png", split="train",
        role=ROLE,
    )  # fmt: skip


def render_icons(planned: Iterable[Drawing], icons: Path, build: Path) -> None:
    """Render what is not there yet. What shows nothing gets no file."""
    render_missing(planned, lambda artist: icons / "json" / f"{artist}.json", build)


def whose(planned: Iterable[Drawing], icons: Path) -> str:
    """A Markdown page: every set with its author, licence and how many of its icons are planned."""
    collections: dict[str, dict[str, Any]] = json.loads((icons / "collections.json").read_bytes())
    counts = Counter(drawing.artist for drawing in planned)
    rows = []
    for artist, count in sorted(counts.items()):
        name, author, licence = (collections[artist][what] for what in ("name", "author", "license"))
        rows.append(f"| `{artist}` | {name}, by {author['name']} | {licence['spdx']} | {count:,} |")
    head = [
        "# Whose icons the image encoder was trained with",
        "",
        f"{counts.total():,} icons of {len(counts)} sets, from `{PACKAGE}` {VERSION} on npm. None is in this",
        "repository, nor in the bundle: they were looked at in training, restyled and photographed by a program.",
        "Written by `python -m demo.icons`.",
        "",
        "| set | name and author | licence | icons |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n"


def plan_from(build: Path, icons: Path) -> list[Drawing]:
    """`plan_icons` for Symbols as it was built in `build`."""
    with (build / "catalog.jsonl").open(encoding="utf-8") as file:
        titles = {record["entity_id"]: record["title"] for record in map(json.loads, file)}
    return plan_icons(icons, read_drawings(build), titles)


@click.command()
@click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Where Symbols was built."
)
def main(build: Path) -> None:
    """Write whose icons the image encoder is trained with."""
    icons = fetch_icons(build / "sources")
    atomic_write_bytes(TABLE, whose(plan_from(build, icons), icons).encode())


if __name__ == "__main__":
    main()
