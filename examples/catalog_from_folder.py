"""Write a catalog from a folder of images and a table, and pairs and queries from some of the images.

    python examples/catalog_from_folder.py PICTURES --table pictures.csv --out mine --train 1 --validation 1 --test 1

The table (UTF-8 CSV with commas, semicolons or tabs) has a row for each image. It needs the columns `image`, a path in
the folder, and `title`. Optional are `entity_id` (default: made from the title), `text`, `description`, `types`
(separated by semicolons or `|`), `url` and `symbol`, filled in once per entity. Without a table, each sub-folder is an
entity of that name.
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

MAX_PIXELS = 64_000_000  # the service's default
ENTITY_COLUMNS = ("text", "description", "types", "url", "symbol")
COLUMNS = ("image", "title", "entity_id", *ENTITY_COLUMNS)
MAX_ERRORS_SHOWN = 5
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}


@dataclass(kw_only=True)
class Entity:
    entity_id: str
    title: str
    fields: dict[str, str] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)


Row = tuple[str, dict[str, str]]  # its position, for messages, and its columns


def rows_of_table(table: Path) -> Iterator[Row]:
    """Yield the rows of a CSV file. Raises `CatalogError` if a needed column is missing or a row is malformed."""
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
            f"{table} has an unknown column {unknown[0]!r}; rename it to one of {', '.join(COLUMNS)}, or remove it"
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
    """Return the entities of the rows, in order. Raises `CatalogError` with the first few bad rows."""
    entities: dict[str, Entity] = {}
    named_by: dict[Path, str] = {}
    errors: list[str] = []
    for where, row in rows:
        if not any(row.values()):
            continue
        try:
            image = pictures / row["image"]
            if earlier := named_by.get(image):
                raise CatalogError(f"{row['image']} is already named by {earlier}")
            if not row["image"] or not image.is_file():
                raise CatalogError(f"{row['image'] or 'an image without a name'} does not exist in the folder")
            decode(image.read_bytes(), max_pixels=MAX_PIXELS)
            add(entities, row, image)
            named_by[image] = where
        except CatalogError as error:
            errors.append(f"{where}: {error}")
        except UserError as error:
            errors.append(f"{where}: {row['image']}: {error}")
    if errors:
        more = f"; and {len(errors) - MAX_ERRORS_SHOWN} more" if len(errors) > MAX_ERRORS_SHOWN else ""
        raise CatalogError(f"{len(errors)} image(s) cannot be used: {'; '.join(errors[:MAX_ERRORS_SHOWN])}{more}")
    if not entities:
        raise CatalogError(
            f"no images in {pictures}; give a --table, or put each entity's images into a folder of its name"
        )
    return list(entities.values())


def add(entities: dict[str, Entity], row: dict[str, str], image: Path) -> None:
    title = row["title"]
    entity_id = row.get("entity_id") or slug(title)
    known = entities.get(entity_id)
    if known is None and not title:
        raise CatalogError(f"{row['image']} has no title")
    entity = known or Entity(entity_id=entity_id, title=title)
    if title not in ("", entity.title):
        raise CatalogError(f"entity {entity_id} has two titles, {entity.title!r} and {title!r}; give it one")
    for name in ENTITY_COLUMNS:
        value = row.get(name, "")
        if value and entity.fields.setdefault(name, value) != value:
            raise CatalogError(f"entity {entity_id} has two different values of {name!r}; give it one")
    entity.images.append(image)
    entities[entity_id] = entity


def slug(title: str) -> str:
    letters = unicodedata.normalize("NFKC", title).casefold()
    return re.sub(r"\W+", "-", letters).strip("-")


def record(entity: Entity, images: Sequence[Path], out: Path) -> dict[str, Any]:
    """Return a line of the catalog, with paths relative to its folder."""
    types = [name.strip() for name in re.split(r"[;|]", entity.fields.get("types", "")) if name.strip()]
    optional = {name: value for name, value in entity.fields.items() if name in ("description", "url", "symbol")}
    return {
        "entity_id": entity.entity_id,
        "title": entity.title,
        "text": entity.fields.get("text", ""),
        "images": [os.path.relpath(image, out) for image in images],
        "types": types,
        **optional,
    }


@click.command()
@click.argument("pictures", type=click.Path(path_type=Path))
@click.option("--table", type=click.Path(path_type=Path), help="CSV file about the images.  [default: folder names]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the files.")
@click.option("--train", type=click.IntRange(min=0), default=0, help="Images of each entity to make pairs of.")
@click.option("--validation", type=click.IntRange(min=0), default=0, help="Images of each entity to fit confidence on.")
@click.option("--test", type=click.IntRange(min=0), default=0, help="Images of each entity to measure with.")
def main(pictures: Path, table: Path | None, out: Path, train: int, validation: int, test: int) -> None:
    """Write catalog.jsonl, and on request pairs.jsonl, validation.jsonl and test.jsonl.

    Those three take an entity's last images, which are then not in the catalog. An entity always keeps its first image.
    """
    if not pictures.is_dir():
        raise UserError(f"{pictures} is not a folder; name the folder of the images")
    entities = read_entities(pictures, rows_of_table(table) if table else rows_of_folders(pictures))
    counts = {"test": test, "validation": validation, "pairs": train}
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in counts}
    catalog = []
    for entity in entities:
        images = list(entity.images)
        for name, count in counts.items():
            for _ in range(min(count, len(images) - 1)):
                image = images.pop()
                row = {"data_id": f"{name}-{len(lines[name]) + 1}", "image": os.path.relpath(image, out)}
                lines[name].append({**row, "entity_id": entity.entity_id, "data_split": f"{name}_seen"})
        catalog.append(record(entity, images, out))
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in {"catalog": catalog, **lines}.items():
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write_bytes(out / f"{name}.jsonl", text.encode())
    aside = ", ".join(f"{len(rows)} {name}" for name, rows in lines.items() if counts[name])
    images_kept = sum(len(line["images"]) for line in catalog)
    click.echo(
        f"{out / 'catalog.jsonl'}: {len(entities)} entities, {images_kept} images" + (f"; {aside}" if aside else "")
    )
    for name, rows in lines.items():
        if short := len(entities) * counts[name] - len(rows):
            click.echo(f"{name}.jsonl lacks {short} image(s): some entities have too few")


if __name__ == "__main__":
    run(main)
