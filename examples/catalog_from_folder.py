"""A catalog from a folder of images and a table that says what they show; pairs and queries from some of the images.

    python examples/catalog_from_folder.py PICTURES --table pictures.csv --out mine --train 1 --validation 1 --test 1

The table (CSV with commas, semicolons or tabs, UTF-8) has a row for each image. Columns: `image`, a path in the folder,
and `title` are needed; `entity_id` (default: made from the title), `text`, `description`, `types` (separated by
semicolons or `|`), `url` and `symbol` are not, and need be filled in only once for each entity. Rows of one entity are
its images. Without a table, each folder in the folder is an entity of that name.
"""

from __future__ import annotations

import csv
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from core.cli import run
from core.errors import CatalogError, UserError
from core.files import atomic_write_bytes
from imaging import decode

MAX_PIXELS = 64_000_000  # as the service's default
ONCE = ("text", "description", "types", "url", "symbol")  # columns that say something of the entity
COLUMNS = ("image", "title", "entity_id", *ONCE)
TOLD_AT_ONCE = 5
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}


@dataclass(kw_only=True)
class Entity:
    entity_id: str
    title: str
    about: dict[str, str] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)


Row = tuple[str, dict[str, str]]  # where it stands, and what is in it


def rows_of_table(table: Path) -> Iterator[Row]:
    """Raises `CatalogError` where it is no table with the columns that are needed."""
    try:
        content = table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CatalogError(f"{table} cannot be read: {error.strerror}; name a CSV file with --table") from error
    except UnicodeDecodeError:
        raise CatalogError(f"{table} is not UTF-8; save it again as CSV with that encoding") from None
    header = content.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(content.splitlines(keepends=True), delimiter=delimiter, restkey="", restval="")
    names = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in ("image", "title") if name not in names]:
        raise CatalogError(f"{table} has no column {' and no column '.join(missing)}; its first line reads {header!r}")
    if unknown := [name for name in names if name not in COLUMNS]:
        raise CatalogError(
            f"{table} has a column {unknown[0]!r} that is none of {', '.join(COLUMNS)}; rename or drop it"
        )
    reader.fieldnames = names
    for row in reader:
        if "" in row:
            raise CatalogError(
                f"line {reader.line_num} of {table} has more fields than the first; quote commas in texts"
            )
        yield f"line {reader.line_num}", {name: value.strip() for name, value in row.items()}


def rows_of_folders(pictures: Path) -> Iterator[Row]:
    for path in sorted(pictures.glob("*/*")):
        if path.suffix.lower() in SUFFIXES:
            yield path.parent.name, {"image": str(path.relative_to(pictures)), "title": path.parent.name}


def read_entities(pictures: Path, rows: Iterator[Row]) -> list[Entity]:
    """The entities of the rows, in their order. Raises `CatalogError` that tells the first few rows that do not do."""
    entities: dict[str, Entity] = {}
    taken: dict[Path, str] = {}
    wrong: list[str] = []
    for where, row in rows:
        if not any(row.values()):
            continue
        try:
            image = pictures / row["image"]
            if earlier := taken.get(image):
                raise CatalogError(f"{row['image']} is named by {earlier} already")
            check_image(image, row["image"])
            add(entities, row, image)
            taken[image] = where
        except CatalogError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        more = f"; and {len(wrong) - TOLD_AT_ONCE} more" if len(wrong) > TOLD_AT_ONCE else ""
        raise CatalogError(f"{len(wrong)} image(s) cannot be used: {'; '.join(wrong[:TOLD_AT_ONCE])}{more}")
    if not entities:
        raise CatalogError(
            f"no image is named in {pictures}; give a --table, or put each entity's images into a folder of its name"
        )
    return list(entities.values())


def check_image(image: Path, named: str) -> None:
    if not named or not image.is_file():
        raise CatalogError(f"{named or 'an image without a name'} does not exist in the folder of the images")
    try:
        decode(image.read_bytes(), max_pixels=MAX_PIXELS)
    except UserError as error:
        raise CatalogError(f"{named}: {error}") from error


def add(entities: dict[str, Entity], row: dict[str, str], image: Path) -> None:
    title = row["title"]
    entity_id = row.get("entity_id") or slug(title)
    known = entities.get(entity_id)
    if known is None and not title:
        raise CatalogError(f"{row['image']} has no title")
    entity = known or Entity(entity_id=entity_id, title=title)
    if title not in ("", entity.title):
        raise CatalogError(f"entity {entity_id} is called both {entity.title!r} and {title!r}; give it one title")
    for name in ONCE:
        value = row.get(name, "")
        if value and entity.about.setdefault(name, value) != value:
            raise CatalogError(f"entity {entity_id} has two different values of {name!r}; one row is enough")
    entity.images.append(image)
    entities[entity_id] = entity


def slug(title: str) -> str:
    letters = unicodedata.normalize("NFKC", title).casefold()
    return re.sub(r"\W+", "-", letters).strip("-")


def record(entity: Entity, images: Sequence[Path], out: Path) -> dict[str, Any]:
    """A line of the catalog, its paths relative to the folder that it lies in."""
    types = [name.strip() for name in re.split(r"[;|]", entity.about.get("types", "")) if name.strip()]
    about: dict[str, Any] = {
        name: entity.about[name] for name in ("description", "url", "symbol") if name in entity.about
    }
    return {
        "entity_id": entity.entity_id,
        "title": entity.title,
        "text": entity.about.get("text", ""),
        "images": [os.path.relpath(image, out) for image in images],
        "types": types,
        **about,
    }


@click.command()
@click.argument("pictures", type=click.Path(path_type=Path))
@click.option("--table", type=click.Path(path_type=Path), help="What the images show, CSV.  [default: folder names]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files, made if need be.")
@click.option("--train", type=click.IntRange(min=0), default=0, help="Images of each entity to make pairs of.")
@click.option("--validation", type=click.IntRange(min=0), default=0, help="Images of each entity to fit confidence on.")
@click.option("--test", type=click.IntRange(min=0), default=0, help="Images of each entity to measure with.")
def main(pictures: Path, table: Path | None, out: Path, train: int, validation: int, test: int) -> None:
    """Write catalog.jsonl, and pairs.jsonl, validation.jsonl and test.jsonl where images are set aside for them.

    What is set aside is taken from an entity's last images and stands in no catalog; its first one always stays.
    """
    if not pictures.is_dir():
        raise UserError(f"{pictures} is no folder; name the folder of the images")
    entities = read_entities(pictures, rows_of_table(table) if table else rows_of_folders(pictures))
    wanted = {"test": test, "validation": validation, "pairs": train}
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in wanted}
    catalog = []
    for entity in entities:
        images = list(entity.images)
        for name, count in wanted.items():
            for _ in range(min(count, len(images) - 1)):
                image = images.pop()
                lines[name].append(
                    {
                        "data_id": f"{name}-{len(lines[name]) + 1}",
                        "image": os.path.relpath(image, out),
                        "entity_id": entity.entity_id,
                        "data_split": f"{name}_seen",
                    }
                )
        catalog.append(record(entity, images, out))
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in {"catalog": catalog, **lines}.items():
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write_bytes(out / f"{name}.jsonl", text.encode())
    told = ", ".join(f"{len(rows)} {name}" for name, rows in lines.items() if wanted[name])
    images_kept = sum(len(line["images"]) for line in catalog)
    click.echo(
        f"{out / 'catalog.jsonl'}: {len(entities)} entities, {images_kept} images" + (f"; {told}" if told else "")
    )
    for name, rows in lines.items():
        if short := len(entities) * wanted[name] - len(rows):
            click.echo(f"{short} image(s) fewer in {name}.jsonl than asked for: some entities have too few")


if __name__ == "__main__":
    run(main)
