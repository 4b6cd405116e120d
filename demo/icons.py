"""Icons by many more artists, to train the image encoder with.

They are all of Iconify's freely licensed sets, except those of Symbols and of held-out artists. Icons with the same
name are taken to show the same thing. Icons with the name of a seen entity of Symbols are more training drawings of it,
and are in no catalog. Icons with the name of an unseen entity are left out.

`demo/icon_sets.md` lists the sets with their authors and licences.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from demo.build import Drawing, read_drawings, render_missing
from demo.entities import slug
from demo.sources import ICON_SETS, IconSet, fetch_package

PACKAGE, VERSION = "@iconify/json", "2.2.535"
ROLE = "icon"

LICENCES = ("MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "MPL-2.0", "OFL-1.1", "CC-BY-4.0", "CC0-1.0", "Unlicense")
# Sets by held-out and adaptor artists, and animated sets.
_EXCLUDED_SETS = re.compile(
    r"(emojione|devicon|flagpack|streamline-emojis|material-icon-theme).*|cif|line-md|svg-spinners|meteocons"
)
_MIN_FAMILIES = 3  # of sets that show a thing
_MAX_PER_FAMILY, _MAX_PER_THING = 3, 10  # icons
_MAX_SVG_CHARS = 20_150  # longer ones are pictures, not icons
_SEED = 5

# Words at the end of a name for the style of drawing, and at its start for the sort of thing.
_STYLES = {
    "outline", "outlined", "line", "lined", "linear", "fill", "filled", "solid", "bold", "duotone", "thin",
    "light", "regular", "broken", "twotone", "rounded", "round", "sharp", "flat", "color", "colored", "mono",
    "icon", "black", "duo", "two", "tone", "logo", "brand", "glyph", "remix", "bulk", "16", "20", "24", "32",
    "48", "12", "28", "96", "1", "dark", "wordmark", "original", "plain", "variants", "static", "16px", "24px",
    "48px", "semibold", "medium", "baseline", "o", "alt", "zz",
}  # fmt: skip
_SORTS = {
    "logo", "brand", "outline", "baseline", "twotone", "round", "sharp", "fill", "solid", "emoji", "animal",
    "food", "fruit", "icon",
}  # fmt: skip


def fetch_icons(sources: Path) -> Path:
    """Download and unpack the icons (104 MB), unless they are there. Raises `UserError`."""
    fetch_package(PACKAGE, VERSION, sources)
    return sources / PACKAGE


def thing(name: str) -> str:
    """Return the thing in an icon's name: `logo-github-fill` and `github-16` both show `github`."""
    words = re.split(r"[-_:]", name.lower())
    while len(words) > 1 and words[-1] in _STYLES:
        words.pop()
    while len(words) > 1 and words[0] in _SORTS:
        words.pop(0)
    return "-".join(words)


def plan_icons(icons: Path, drawings: Iterable[Drawing], titles: Mapping[str, str]) -> list[Drawing]:
    """Return the icons to train with. Their `entity_id` is that of an entity of Symbols or `icon:NAME`.

    `drawings` and `titles` (by entity id) are those of Symbols. The same package always gives the same icons.
    """
    seen: dict[str, set[str]] = defaultdict(set)
    unseen: set[str] = set()
    for drawing in drawings:
        for name in {thing(drawing.icon), thing(slug(titles.get(drawing.entity_id, "")))} - {""}:
            if drawing.split.endswith("unseen"):
                unseen.add(name)
            else:
                seen[name].add(drawing.entity_id)
    chance = random.Random(_SEED)
    planned: dict[str, list[Drawing]] = {}  # if several names fit an entity, the last one counts
    for name, found in _by_thing(icons).items():
        entities = seen.get(name, set())
        families = {family for family, *_ in found}
        too_few = len(families) < (1 if entities else _MIN_FAMILIES)
        if name in unseen or len(name) < 2 or name.isdigit() or len(entities) > 1 or too_few:
            continue
        entity_id = next(iter(entities), f"icon:{name}")
        about = {"entity_id": entity_id, "kind": "icon", "split": "train", "role": ROLE}
        planned[entity_id] = [
            Drawing(artist=artist, icon=icon, image=f"icons/{artist}/{icon}.png", **about)
            for artist, icon in _chosen(found, chance)
        ]
    return [drawing for mine in planned.values() for drawing in mine]


def _by_thing(icons: Path) -> dict[str, list[tuple[str, str, str, bool]]]:
    """Return the icons of each thing: family of sets, set, name, and whether it has colours."""
    collections: dict[str, dict[str, Any]] = json.loads((icons / "collections.json").read_bytes())
    things: dict[str, list[tuple[str, str, str, bool]]] = {}
    for artist, about in collections.items():
        free = about["license"].get("spdx") in LICENCES
        if free and artist not in ICON_SETS and not _EXCLUDED_SETS.fullmatch(artist):
            icon_set = IconSet(icons / "json" / f"{artist}.json")
            family, in_colour = artist.partition("-")[0], bool(about.get("palette"))
            for name in icon_set.names:
                if len(icon_set.svg(name)) <= _MAX_SVG_CHARS:
                    things.setdefault(thing(name), []).append((family, artist, name, in_colour))
    return things


def _chosen(found: list[tuple[str, str, str, bool]], chance: random.Random) -> list[tuple[str, str]]:
    """Choose icons of a thing, as (set, name): one per family, then a second one, coloured ones first."""
    chance.shuffle(found)
    by_family: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for family, artist, name, _ in sorted(found, key=lambda each: not each[3]):
        by_family[family].append((artist, name))
    in_turn = [mine[place] for place in range(_MAX_PER_FAMILY) for mine in by_family.values() if place < len(mine)]
    return in_turn[:_MAX_PER_THING]


def render_icons(planned: Iterable[Drawing], icons: Path, build: Path) -> None:
    """Render the missing icons. A blank one gets no file."""
    render_missing([(icons / "json" / f"{icon.artist}.json", icon) for icon in planned], build)


def plan_from(build: Path, icons: Path) -> list[Drawing]:
    """Run `plan_icons` for the Symbols in `build`."""
    with (build / "catalog.jsonl").open(encoding="utf-8") as file:
        titles = {record["entity_id"]: record["title"] for record in map(json.loads, file)}
    return plan_icons(icons, read_drawings(build), titles)
