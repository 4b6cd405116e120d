"""Builds Symbols under `demo/build/`: `python -m demo.build`, or `make symbols`.

- `sources/`: the npm packages
- `drawings/`: one RGBA image of 128 px per entity and artist
- `photos/`: photographs of the held-out artists' drawings, the training drawings and those of the catalog
- `drawings.jsonl`: the artist, entity, split and role of each drawing
- `catalog.jsonl`: every entity, with the drawings of the artists that are not held out
- `catalog.jsonl.types.jsonl`: the parents of their types, of which `wikiclip export` makes the hierarchy
- `pairs_train.jsonl`: seen entities by training artists, clean and photographed
- `queries_{val,test}_{clean,photo}.jsonl`: the held-out artists' drawings
- `queries_calibration.jsonl`: drawings by artists that the image encoder never saw, to fit confidence on

A second run adds only missing files.
"""

import json
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from catalog.formats import types_path
from core.arrays import Pixels
from core.files import atomic_write, atomic_write_bytes
from core.lines import to_jsonl
from demo.entities import Symbol, build_symbols, type_parents
from demo.photograph import take_photographs
from demo.sources import IconSet, fetch, render

BUILD = Path(__file__).parent / "build"
HELD_OUT_ARTISTS = ("emojione", "flagpack", "devicon")
ADAPTOR_ARTISTS = ("streamline-emojis", "cif", "material-icon-theme")  # the image encoder never trains on these
CATALOG_ROLES = ("train", "catalog")
UNSEEN_SHARE = 0.2
VALIDATION_SHARE = 0.25
SPLIT_SEED = 20260310
PHOTO_SEED = 9921
PHOTO_PX = 256
CALIBRATION_PHOTOS = 5  # per drawing that confidence is fitted to

# Reference points for naming colours, sRGB.
_COLOURS = {
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
    "light grey": (200, 200, 200),
    "white": (250, 250, 250),
    "red": (215, 40, 45),
    "dark red": (130, 20, 25),
    "orange": (245, 140, 30),
    "brown": (130, 80, 45),
    "yellow": (252, 210, 50),
    "beige": (235, 210, 170),
    "light green": (150, 205, 80),
    "green": (30, 150, 60),
    "dark green": (15, 85, 45),
    "turquoise": (40, 190, 180),
    "light blue": (110, 190, 240),
    "blue": (30, 100, 210),
    "dark blue": (20, 35, 110),
    "purple": (130, 60, 170),
    "pink": (240, 130, 175),
}

build_option = click.option(
    "--build", type=click.Path(path_type=Path, file_okay=False), default=BUILD, help="Folder of Symbols."
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One artist's drawing of one entity.

    Roles:
    - `train`: a seen entity, in the catalog and in training
    - `catalog`: an unseen entity, in the catalog only
    - `adapt`: a seen entity by one of `ADAPTOR_ARTISTS`, only for training the adaptor
    - `query`: by a held-out artist
    - `icon`: not of Symbols (`demo/icons.py`)
    """

    entity_id: str
    kind: str
    artist: str
    icon: str
    image: str
    split: str
    role: str

    def photo(self, number: int = 1) -> str:
        """Return the path of one of the drawing's photographs."""
        return f"photos/{self.artist}_{Path(self.image).stem}{f'_{number}' if number > 1 else ''}.jpg"


def read_drawings(build: Path) -> list[Drawing]:
    with (build / "drawings.jsonl").open(encoding="utf-8") as file:
        return [Drawing(**json.loads(line)) for line in file]


def split_entities(symbols: Iterable[Symbol]) -> dict[str, str]:
    """Map entity ids to val_seen, val_unseen, test_seen or test_unseen, in equal shares of each kind of entity."""
    by_kind: dict[str, list[str]] = {}
    for symbol in symbols:
        by_kind.setdefault(symbol.kind, []).append(symbol.entity_id)
    splits: dict[str, str] = {}
    for kind, ids in by_kind.items():
        random.Random(f"{SPLIT_SEED} {kind}").shuffle(ids)
        unseen = round(len(ids) * UNSEEN_SHARE)
        for part, members in (("unseen", ids[:unseen]), ("seen", ids[unseen:])):
            validation = round(len(members) * VALIDATION_SHARE)
            splits |= dict.fromkeys(members[:validation], f"val_{part}")
            splits |= dict.fromkeys(members[validation:], f"test_{part}")
    return splits


def plan_drawings(symbols: Iterable[Symbol], splits: dict[str, str]) -> list[Drawing]:
    """Return every drawing with its role, except of entities that only held-out or adaptor artists drew."""
    drawings = []
    for symbol in symbols:
        if not set(symbol.drawings) - set(HELD_OUT_ARTISTS + ADAPTOR_ARTISTS):
            continue
        split = splits[symbol.entity_id]
        for artist, icon in symbol.drawings.items():
            role = "catalog" if split.endswith("unseen") else "train"
            if artist in HELD_OUT_ARTISTS:
                role = "query"
            elif artist in ADAPTOR_ARTISTS:
                if role == "catalog":
                    continue
                role = "adapt"
            image = f"drawings/{artist}/{symbol.entity_id.replace(':', '_')}.png"
            entity = {"entity_id": symbol.entity_id, "kind": symbol.kind, "split": split, "role": role}
            drawings.append(Drawing(artist=artist, icon=icon, image=image, **entity))
    return drawings


def _write_jsonl(path: Path, rows: Iterable[dict[str, object]]) -> None:
    atomic_write_bytes(path, to_jsonl(rows))


def render_missing(drawings: Iterable[tuple[Path, Drawing]], build: Path) -> None:
    """Render missing drawings, each given with the file of its icon set, on all cores. A blank one gets no file."""
    missing = [(file, drawing, build) for file, drawing in drawings if not (build / drawing.image).exists()]
    missing.sort(key=lambda each: each[0])  # a process keeps one icon set in memory
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(tqdm(pool.map(_render, missing, chunksize=64), total=len(missing), desc="drawings", unit="drawing"))


_icon_set = lru_cache(maxsize=1)(IconSet)


def _render(job: tuple[Path, Drawing, Path]) -> None:
    file, drawing, build = job
    image, path = render(_icon_set(file).svg(drawing.icon)), build / drawing.image
    if not is_blank(np.asarray(image)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            image.save(temporary, "PNG")


def visible(drawings: Iterable[Drawing], build: Path) -> list[Drawing]:
    """Return the drawings that rendered to something visible."""
    return [drawing for drawing in drawings if (build / drawing.image).exists()]


def _photograph_all(drawn: list[Drawing], build: Path, seed: int, number: int = 1) -> None:
    (build / "photos").mkdir(exist_ok=True)
    for start in tqdm(range(0, len(drawn), 32), desc="photos", unit="batch"):
        batch = drawn[start : start + 32]
        if all((build / drawing.photo(number)).exists() for drawing in batch):
            continue
        files = take_photographs((Image.open(build / drawing.image) for drawing in batch), PHOTO_PX, seed + start)
        for drawing, file in zip(batch, files, strict=True):
            atomic_write_bytes(build / drawing.photo(number), file)


def _labelled(drawing: Drawing, how: str, data_split: str, number: int = 1) -> dict[str, object]:
    """Return a row of a pairs or queries file: the drawing (`clean`) or one of its photographs (`photo`)."""
    return {
        "data_id": f"{how}{number if number > 1 else ''}:{drawing.artist}:{drawing.entity_id}",
        "image": drawing.image if how == "clean" else drawing.photo(number),
        "entity_id": drawing.entity_id,
        "data_split": data_split,
    }


@click.command()
@build_option
def main(build: Path) -> None:
    """Build Symbols: fetch the icon packages, render every drawing, write catalog, pairs and queries."""
    fetch(build / "sources")
    symbols = {symbol.entity_id: symbol for symbol in build_symbols(build / "sources")}
    splits = split_entities(symbols.values())
    planned = plan_drawings(symbols.values(), splits)
    render_missing([(build / "sources" / d.artist / "icons.json", d) for d in planned], build)
    drawings = visible(planned, build)
    _write_jsonl(build / "drawings.jsonl", map(asdict, drawings))

    catalog: dict[str, list[Drawing]] = {}
    for drawing in drawings:
        if drawing.role in CATALOG_ROLES:
            catalog.setdefault(drawing.entity_id, []).append(drawing)
    _write_jsonl(types_path(build / "catalog.jsonl"), type_parents(symbols.values(), build / "sources"))
    _write_jsonl(build / "catalog.jsonl", (_record(symbols[i], drawn, build) for i, drawn in catalog.items()))

    training = [d for d in drawings if d.role in ("train", "adapt")]
    queries = [d for d in drawings if d.role == "query" and d.entity_id in catalog]
    # All drawings by artists that the image encoder never saw, except test queries.
    unfamiliar = [d for d in queries if d.split.startswith("val")] + [d for d in training if d.role == "adapt"]
    _photograph_all(queries, build, PHOTO_SEED)
    _photograph_all(training, build, PHOTO_SEED + 10**6)
    _photograph_all([d for d in drawings if d.role == "catalog"], build, PHOTO_SEED + 10**7)
    for number in range(2, CALIBRATION_PHOTOS + 1):
        _photograph_all(unfamiliar, build, PHOTO_SEED + number * 10**6, number)

    pairs = (_labelled(d, how, f"train_{how}_seen") for d in training for how in ("clean", "photo"))
    _write_jsonl(build / "pairs_train.jsonl", pairs)
    for part in ("val", "test"):
        for how in ("clean", "photo"):
            mine = [d for d in queries if d.split.startswith(part)]
            rows = (_labelled(d, how, f"{d.kind}_{how}_{d.split.removeprefix(part + '_')}") for d in mine)
            _write_jsonl(build / f"queries_{part}_{how}.jsonl", rows)
    views = [("clean", 1), *(("photo", number) for number in range(1, CALIBRATION_PHOTOS + 1))]
    rows = (_labelled(d, how, f"{d.kind}_{how}", number) for d in unfamiliar for how, number in views)
    _write_jsonl(build / "queries_calibration.jsonl", rows)
    click.echo(f"{len(catalog)} entities, {len(drawings)} drawings, {len(queries)} queries in {build.name}/")


def _record(symbol: Symbol, drawn: list[Drawing], build: Path) -> dict[str, object]:
    pixels = [np.asarray(Image.open(build / d.image)) for d in drawn]
    colours = main_colours(np.concatenate(pixels))
    text = symbol.knowledge + (f" It is drawn mainly in {', '.join(colours)}." if colours else "")
    return {
        "entity_id": symbol.entity_id,
        "title": symbol.title,
        "text": text,
        "images": [d.image for d, each in zip(drawn, pixels, strict=True) if not is_blank(each, on_white=True)],
        "url": symbol.url,
        "types": symbol.types,
        "titles": symbol.titles,
        "symbol": symbol.symbol,
        "description": symbol.description,
    }


def is_blank(rgba: Pixels, *, on_white: bool = False) -> bool:
    """Whether nothing is visible, as when the renderer lacks a feature of the SVG.

    `on_white` also treats a white mark as blank.
    """
    visible = rgba[..., 3] > 16
    if on_white:
        visible &= (rgba[..., :3] < 240).any(axis=-1)
    return bool(visible.mean() < 0.005)


def main_colours(rgba: Pixels, *, most: int = 3, least_share: float = 0.1) -> list[str]:
    """Return the names of the colours that cover most of the visible pixels, the largest first."""
    visible = rgba[rgba[..., 3] > 128][:, :3].astype(np.float32)
    if not len(visible):
        return []
    names = list(_COLOURS)
    reference = np.array(list(_COLOURS.values()), dtype=np.float32)
    nearest = ((visible[:, None, :] - reference[None]) ** 2).sum(-1).argmin(1)
    share = np.bincount(nearest, minlength=len(names)) / len(visible)
    return [names[i] for i in np.argsort(-share, kind="stable")[:most] if share[i] >= least_share]


if __name__ == "__main__":
    main()
