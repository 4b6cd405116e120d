"""Build a catalog from a folder of pictures (`wikiclip catalog --folder`).

Without a table, each folder that has pictures is an entity. Its title is its path below the folder that is read, such
as `birds/kingfisher`, and `text.txt` or `text.md` in it is its text. With a table, each row describes a picture.
"""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catalog.formats import write_rows
from catalog.images import UnusableImage
from catalog.pictures import FolderReader, check_pictures
from catalog.records import BadRecord
from core.errors import CatalogError, UserError
from core.files import atomic_write_bytes
from core.lines import Rejected, RejectLog, excerpt, rejects_path, to_jsonl

ENTITY_COLUMNS = ("text", "description", "types", "url", "symbol")
COLUMNS = ("image", "title", "entity_id", *ENTITY_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """The options of `wikiclip catalog --folder`."""

    folder: Path
    out: Path
    table: Path | None = None
    set_aside: Mapping[str, int] = field(default_factory=dict)  # pictures of each entity, by name of the queries file
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class FolderCatalog:
    """The rows of a catalog, the labelled queries by name of their file, and what was not used.

    A row also has the SHA-256 of its images, so that the catalog of other pictures differs.
    """

    rows: list[dict[str, Any]]
    queries: Mapping[str, list[dict[str, Any]]]
    rejected: list[Rejected]


@dataclass(kw_only=True)
class _Entity:
    title: str
    cells: dict[str, str] = field(default_factory=dict)  # by name in ENTITY_COLUMNS
    pictures: dict[str, Path] = field(default_factory=dict)  # by SHA-256


def build_folder_catalog(config: FolderConfig) -> FolderCatalog:
    """Write the catalog, labelled queries as `NAME.jsonl` next to it, and what is not used to `rejected.jsonl`.

    Raises `UserError` if an output exists, and what `read_folder` raises.
    """
    if not config.out.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise UserError(f"--out {config.out} must end in .jsonl, .jsonl.gz or .parquet")
    outputs = [config.out, *_queries_paths(config).values()]
    if rejects_path(config.out) in outputs or len(set(outputs)) < len(outputs):
        raise UserError("--set-aside has a name that another file has; choose another one")
    for path in outputs:
        if path.exists():
            raise UserError(f"{path} exists; remove it, or choose another folder")
    found = read_folder(config)
    for name, path in _queries_paths(config).items():
        atomic_write_bytes(path, to_jsonl(found.queries[name]))
    write_rows(config.out, iter(found.rows))
    return found


def check_folder(folder: Path) -> None:
    """Raise `UserError` if there is no such folder, or nothing in it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder of the pictures")
    if not any(folder.iterdir()):
        raise UserError(f"{folder} is empty; put the pictures of each thing into a folder named after it")


def read_folder(config: FolderConfig, ours: Iterable[Path] = ()) -> FolderCatalog:
    """Read a folder of pictures, and write what is not used to `rejected.jsonl` next to the output.

    `ours` are further files that this program wrote. Raises what `check_folder` raises, `CatalogError` if there is no
    usable picture or the table cannot be read.
    """
    check_folder(config.folder)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    log = RejectLog(rejects_path(config.out))
    ours = [*ours, config.out, log.path, *_queries_paths(config).values()]
    if config.table is None:
        reader = FolderReader(config.folder, ours, with_texts=True)
        entities = _entities_of_folders(config, reader)
    else:
        reader = FolderReader(config.folder, [*ours, config.table], with_texts=False)
        entities = _entities_of_table(config, config.table, reader)
    for key, entity in list(entities.items()):
        if not entity.pictures:
            reader.rejected.append(Rejected(line=0, reason="nothing with a usable picture", record=entity.title))
            del entities[key]
    for rejected in reader.rejected:
        log.add(rejected)
    if not entities:
        raise CatalogError(
            f"{config.folder} has no picture that can be used: {summarise(reader.rejected)}; put the pictures of each "
            "thing into a folder named after it, or describe them in a --table"
        )
    queries: dict[str, list[dict[str, Any]]] = {name: [] for name in config.set_aside}
    rows = [_row(config, key, entity, queries) for key, entity in entities.items()]
    return FolderCatalog(rows=rows, queries=queries, rejected=reader.rejected)


def report(found: FolderCatalog, config: FolderConfig) -> dict[str, Any]:
    """Return the counts of a catalog, to print as JSON."""
    return {
        "catalog": str(config.out),
        "entities": len(found.rows),
        "images": sum(len(row["images"]) for row in found.rows),
        "set_aside": {name: len(rows) for name, rows in found.queries.items()},
        "rejected": len(found.rejected),
        "rejects": str(rejects_path(config.out)) if found.rejected else "",
    }


def report_lines(found: FolderCatalog, config: FolderConfig) -> Iterator[str]:
    """Yield the counts of a catalog as lines of text."""
    counts = report(found, config)
    aside = "".join(f"; {count} {name}" for name, count in counts["set_aside"].items())
    yield f"catalog {config.out}: {counts['entities']} entities, {counts['images']} images{aside}"
    for name, count in counts["set_aside"].items():
        if short := len(found.rows) * config.set_aside[name] - count:
            yield f"{name}.jsonl lacks {short} image(s): some entities have too few"
    if found.rejected:
        yield f"{len(found.rejected)} not used: {summarise(found.rejected)}; see {counts['rejects']}"


def entity_id_of(title: str) -> str:
    """Return the id of an entity that is given none. Titles that differ in case, spaces or Unicode form share it."""
    return re.sub(r"\s+", "-", unicodedata.normalize("NFKC", title).casefold().strip())


def summarise(rejected: Iterable[Rejected]) -> str:
    """Return the number of rejects of each kind, such as `2 x not a picture (notes.txt, ...)`."""
    records: dict[str, list[str]] = {}
    for each in rejected:
        records.setdefault(each.reason.partition(":")[0], []).append(each.record)
    return ", ".join(
        f"{len(names)} x {kind} ({repr(names[0])[1:-1]}{', ...' if len(names) > 1 else ''})"
        for kind, names in sorted(records.items(), key=lambda item: -len(item[1]))
    )


def _queries_paths(config: FolderConfig) -> dict[str, Path]:
    return {name: config.out.with_name(f"{name}.jsonl") for name in config.set_aside}


def _entities_of_folders(config: FolderConfig, reader: FolderReader) -> dict[str, _Entity]:
    """Return the entities by id. Some may have no picture."""
    folders = []
    for folder in reader.folders():
        if folder.path != config.folder:
            folders.append(folder)
            continue
        for path in folder.files:
            reader.reject(path, "in no folder of its own: put it into a folder named after what it shows")
    checked = check_pictures([path for folder in folders for path in folder.files], progress=config.progress)
    entities: dict[str, _Entity] = {}
    for folder in folders:
        if not folder.files and not folder.texts:
            continue
        key = entity_id_of(folder.name)
        if key in entities:
            title = entities[key].title
            reader.reject(folder.path, f"folder with the name of another: its pictures were added to {title!r}")
        entity = entities.setdefault(key, _Entity(title=folder.name))
        texts = [entity.cells["text"]] if "text" in entity.cells else []
        entity.cells["text"] = "\n\n".join([*texts, *folder.texts])
        for path in folder.files:
            _add(entity, path, checked[path], reader)
    return entities


def _entities_of_table(config: FolderConfig, table: Path, reader: FolderReader) -> dict[str, _Entity]:
    """Return the entities by id. Some may have no picture."""
    files = {reader.name_of(path): path for folder in reader.folders() for path in folder.files}
    entities: dict[str, _Entity] = {}
    line_of: dict[str, int] = {}
    rows: list[tuple[int, _Entity, Path]] = []
    for item in _read_table(table):
        if isinstance(item, Rejected):
            reader.rejected.append(item)
            continue
        line, row = item
        image = Path(row["image"]).as_posix()
        try:
            if image not in files:
                raise BadRecord("picture that is not in the folder")
            if line_of.setdefault(image, line) != line:
                raise BadRecord(f"picture that was named before: on line {line_of[image]}")
            rows.append((line, _describe(entities, row), files[image]))
        except BadRecord as error:
            reader.rejected.append(Rejected(line=line, reason=str(error), record=image))
    for image, path in files.items():
        if image not in line_of:
            reader.reject(path, "not in the table")
    checked = check_pictures([path for _, _, path in rows], progress=config.progress)
    for line, entity, path in rows:
        _add(entity, path, checked[path], reader, line=line)
    return entities


def _read_table(path: Path) -> Iterator[tuple[int, dict[str, str]] | Rejected]:
    """Yield line and cells of each row of a table in UTF-8 with commas, semicolons or tabs, without empty rows.

    Cells that are not there are empty.

    Raises `CatalogError` if the file cannot be read, or its first line lacks a column or has an unknown one.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}; name a CSV file with --table") from error
    except UnicodeDecodeError:
        raise CatalogError(f"{path} is not UTF-8; save it again as CSV with that encoding") from None
    header = content.partition("\n")[0].strip()
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, restkey="", restval="")
    names = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in ("image", "title") if name not in names]:
        raise CatalogError(f"{path} has no column {' and no column '.join(missing)}; its first line reads {header!r}")
    if unknown := [name for name in names if name not in COLUMNS]:
        raise CatalogError(
            f"{path} has an unknown column {unknown[0]!r}; rename it to one of {', '.join(COLUMNS)}, or remove it"
        )
    reader.fieldnames = names
    try:
        for row in reader:
            if "" in row:
                reason = "row with more cells than the first line: quote commas in texts"
                yield Rejected(line=reader.line_num, reason=reason, record=excerpt(row))
                continue
            cells = {name: value.strip() for name, value in row.items()}
            if any(cells.values()):
                yield reader.line_num, cells
    except csv.Error as error:
        raise CatalogError(f"line {reader.line_num} of {path} is not CSV: {error}; save it again as CSV") from error


def _describe(entities: dict[str, _Entity], row: Mapping[str, str]) -> _Entity:
    """Return the entity of a row with the cells of the row added. Raises `BadRecord` if they contradict others."""
    title = unicodedata.normalize("NFC", row["title"])
    key = row.get("entity_id") or entity_id_of(title)
    known = entities.get(key)
    if known is None and not title:
        raise BadRecord("row without a title")
    entity = known or _Entity(title=title)
    if title and entity_id_of(title) != entity_id_of(entity.title):
        raise BadRecord(f"row with another title: entity {key} has {entity.title!r}; give it one")
    cells = {name: value for name in ENTITY_COLUMNS if (value := row.get(name))}
    if differing := [name for name, value in cells.items() if entity.cells.get(name, value) != value]:
        raise BadRecord(f"row with another {differing[0]}: give entity {key} one")
    entity.cells |= cells
    return entities.setdefault(key, entity)


def _add(entity: _Entity, path: Path, checked: str | UnusableImage, reader: FolderReader, *, line: int = 0) -> None:
    if isinstance(checked, UnusableImage):
        reader.reject(path, str(checked), line=line)
    elif checked in entity.pictures:
        reader.reject(path, f"copy of a picture: {reader.name_of(entity.pictures[checked])} is the same", line=line)
    else:
        entity.pictures[checked] = path


def _row(
    config: FolderConfig, key: str, entity: _Entity, queries: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return an entity's row of the catalog. Its last pictures go to `queries`, but it keeps the first one."""
    images = [(sha256, _relative(path, config)) for sha256, path in entity.pictures.items()]
    for name, count in config.set_aside.items():
        for _ in range(min(count, len(images) - 1)):
            _, image = images.pop()
            row = {"data_id": f"{name}-{len(queries[name]) + 1}", "image": image}
            queries[name].append({**row, "entity_id": key, "data_split": f"{name}_seen"})
    types = [name.strip() for name in re.split(r"[;|]", entity.cells.get("types", "")) if name.strip()]
    return {
        "entity_id": key,
        "title": entity.title,
        "text": entity.cells.get("text") or entity.title,
        "images": [image for _, image in images],
        "types": types,
        **{name: entity.cells[name] for name in ("description", "url", "symbol") if name in entity.cells},
        "sha256": [sha256 for sha256, _ in images],
    }


def _relative(path: Path, config: FolderConfig) -> str:
    """Return a picture's path as seen from the catalog's folder. Links to either folder are resolved first."""
    root, out = os.path.realpath(config.folder), os.path.realpath(config.out.parent)
    return os.path.relpath(os.path.join(root, path.relative_to(config.folder)), out)
