"""Build a catalog from Wikimedia's public dumps, or bring an earlier catalog up to date (`wikiclip catalog`).

Each dump is streamed once into a work file (`catalog.joins`), from which the catalog is then written. Fields whose dump
is left out are copied from the base catalog.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from catalog.dumps import (
    CLASS_CLAIMS,
    LeftOut,
    check_kind,
    file_url,
    number_of,
    parse_item,
    parse_page,
    read_documents,
    read_page_images,
    site_of,
    wiki_of,
)
from catalog.formats import check_catalog_name, copy_types, read_catalog, types_path, write_catalog
from catalog.joins import JoinedPage, Joins, open_joins
from catalog.records import BadRecord, EntityRecord, to_native
from core.errors import CatalogError, UserError
from core.files import atomic_write_bytes, report_disk_full
from core.lines import START, OnBytes, Position, RejectLog, read_lines, to_jsonl

COMMONS = "https://commons.wikimedia.org"
NO_ENTITIES = (4167410, 13406463, 4167836, 11266439)  # disambiguation pages, lists, categories, templates
_COMMIT_EVERY = 2_000
_FROM_BASE = ("images", "image_credits", "types", "titles", "symbol", "description")
_CONTENT_FILES = ("*.json", "*.json.gz", "*.json.bz2")

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class CatalogConfig:
    """The options of `wikiclip catalog`. Types are item numbers: 42 is Q42."""

    content: tuple[Path, ...]
    out: Path
    page_props: tuple[Path, ...] = ()
    wikidata: Path | None = None
    base: Path | None = None
    language: str | None = None  # None: any
    titles: tuple[str, ...] = ()  # languages of further titles
    types: tuple[int, ...] = ()
    without_types: tuple[int, ...] = NO_ENTITIES
    min_links: int = 0
    max_text: int = 4000
    image_width_px: int = 500  # 0: as uploaded
    free_images: bool = False
    resume: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class CatalogReport:
    """What became of every document, and how the catalog differs from its base."""

    catalog: str
    documents: int = 0
    entities: int = 0
    with_image: int = 0
    with_text: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    rejected: int = 0
    rejects: str = ""
    against_base: Mapping[str, int] | None = None
    elapsed_s: float = 0.0


def build_catalog(config: CatalogConfig) -> CatalogReport:
    """Write the catalog, its report as `NAME.report.json`, and bad records to `rejected.jsonl`.

    The parents of its types go to `NAME.types.jsonl`, where `wikiclip export` finds them.

    After an interruption, the same call with `resume` finishes it, with the same bytes. Raises `CatalogError` for a
    dump that cannot be read, `UserError` if the output exists or was begun with other settings.
    """
    started = time.perf_counter()
    report_path = config.out.with_name(f"{config.out.name}.report.json")
    work = config.out.with_name(f".{config.out.name}.work")
    _check(config, work)
    content = _content_files(config.content)
    settings = _settings(config, content)
    if config.out.exists() and not work.exists():
        finished = json.loads(report_path.read_bytes()) if report_path.exists() else {}
        if finished.pop("settings", None) != settings:
            raise UserError(f"--out {config.out} exists and was made with other settings; choose another name")
        return CatalogReport(**finished)
    for option, paths in (
        ("--content", content),
        ("--page-props", config.page_props),
        ("--wikidata", [config.wikidata]),
    ):
        for path in filter(None, paths):
            check_kind(path, option)
    with report_disk_full(config.out), open_joins(work, settings) as joins:
        if config.base is not None:
            _read_base(joins, config.base)
        for path in content:
            _read_content(joins, path, config)
        for path in config.page_props:
            _read_page_props(joins, path, config)
        if config.wikidata is not None:
            _read_wikidata(joins, config.wikidata, config)
        report = _write(joins, config, {path.name for path in content})
        report = replace(report, elapsed_s=round(time.perf_counter() - started, 3))
        atomic_write_bytes(report_path, json.dumps({**asdict(report), "settings": settings}, indent=2).encode())
    return report


def _check(config: CatalogConfig, work: Path) -> None:
    check_catalog_name(config.out)
    if not config.resume and work.exists():
        raise UserError(f"--out {config.out} is unfinished; finish it with --resume, or remove {work}")
    if not config.resume and config.out.exists():
        raise UserError(f"--out {config.out} exists; choose another name (--base makes a new catalog of an old one)")
    if (config.types or config.without_types != NO_ENTITIES) and config.wikidata is None:
        raise UserError("--types and --without-types need --wikidata")
    for path in (*config.content, *config.page_props, config.wikidata, config.base):
        if path is not None and not path.exists():
            raise CatalogError(f"{path} does not exist; check the path")


def _content_files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(file for pattern in _CONTENT_FILES for file in path.glob(pattern)) if path.is_dir() else [path]
        if not found:
            raise CatalogError(f"{path} has no .json, .json.gz or .json.bz2 file; give the folder of the dump")
        files += found
    if repeated := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise UserError(f"two files of --content are named {repeated[0]}; give each once")
    return files


def _settings(config: CatalogConfig, content: list[Path]) -> dict[str, Any]:
    """Return everything that the catalog depends on. Dumps count by name and size, which is faster than hashing."""

    def stored(value: Any) -> Any:
        if isinstance(value, Path):
            return [value.name, value.stat().st_size]
        return list(map(stored, value)) if isinstance(value, tuple) else value

    options = {**vars(config), "content": tuple(content)}
    names = [name for name in options if name not in ("out", "resume", "progress")]
    return {name.removesuffix("_px").replace("_", " "): stored(options[name]) for name in names}


def _read_base(joins: Joins, path: Path) -> None:
    """Add all records of the base catalog, in one commit."""
    _, done = joins.progress("base")
    if done:
        return
    for item in read_catalog(path):
        if isinstance(item, EntityRecord):
            row = to_native(item)
            stored = {name: row.get(name) for name in _FROM_BASE}
            joins.add_base(item.entity_id, _digest(row), stored)
    joins.set_progress("base", START, done=True)


def _digest(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).digest()


def _resumable(
    joins: Joins,
    stage: str,
    path: Path,
    read: Callable[[Path, Position, OnBytes], Iterator[tuple[Item, Position]]],
    config: CatalogConfig,
) -> Iterator[tuple[Item, int]]:
    """Yield each item of a dump with its line number, from where an earlier run stopped.

    An item counts as read when the next one is requested. Progress is committed every 2,000 items and at the end.
    """
    source = f"{stage} {path.name}"
    start, done = joins.progress(source)
    if done:
        return
    position, size = start, path.stat().st_size
    with tqdm(
        desc=source, unit="B", unit_scale=True, total=size, initial=start.offset, disable=not config.progress
    ) as bar:
        for count, (item, position) in enumerate(read(path, start, bar.update), 1):
            yield item, position.line
            if count % _COMMIT_EVERY == 0:
                joins.set_progress(source, position)
    joins.set_progress(source, position, done=True)


def _read_content(joins: Joins, path: Path, config: CatalogConfig) -> None:
    for (page_id, document), line in _resumable(joins, "content", path, read_documents, config):
        try:
            page = parse_page(
                document, page_id, language=config.language, min_links=config.min_links, max_text=config.max_text
            )
            if not joins.add_page(page):
                joins.leave_out("about the same entity as an earlier document")
        except LeftOut as reason:
            joins.leave_out(str(reason))
        except BadRecord as error:
            joins.reject(path.name, line, str(error), document)


def _read_page_props(joins: Joins, path: Path, config: CatalogConfig) -> None:
    wiki = wiki_of(path)
    for images, _ in _resumable(joins, "page props", path, read_page_images, config):
        joins.add_page_images(wiki, images)


def _read_wikidata(joins: Joins, path: Path, config: CatalogConfig) -> None:
    languages = tuple(dict.fromkeys((config.language or "en", *config.titles)))
    for entity, line in _resumable(joins, "wikidata", path, read_lines, config):
        number = number_of(entity)
        # Only about one in eight of the 115 million items is needed. The others are not parsed.
        has_superclasses = any(claim in entity for claim in CLASS_CLAIMS)
        if number is not None and not has_superclasses and not joins.has_item(number):
            continue
        try:
            item = parse_item(entity, languages)
        except BadRecord as error:
            joins.reject(path.name, line, str(error), entity)
            continue
        if item is not None and joins.has_item(item.number):
            joins.add_item(item)
        if item is not None and item.superclasses:
            joins.add_class(item, item.labels.get(languages[0]))


def _write(joins: Joins, config: CatalogConfig, content_names: Collection[str]) -> CatalogReport:
    log = RejectLog(config.out.with_name("rejected.jsonl"))
    left_out = Counter(joins.left_out())
    documents = joins.count("pages") + left_out.total()
    for source, rejected in joins.rejected():
        documents += source in content_names
        log.add(rejected)
    joins.name_types()
    joins.create_class_table("wanted_types", config.types)
    joins.create_class_table("unwanted_types", config.without_types)
    counts: Counter[str] = Counter()

    def records() -> Iterator[EntityRecord]:
        total = joins.count("pages")
        for page in tqdm(joins.joined(), desc="writing", unit="entity", total=total, disable=not config.progress):
            if joins.has_type_in("unwanted_types", page.item):
                left_out["of an excluded type"] += 1
                continue
            if config.types and not joins.has_type_in("wanted_types", page.item):
                left_out["of none of the requested types"] += 1
                continue
            record = _record(page, config)
            counts["entities"] += 1
            counts["with_image"] += bool(record.images)
            counts["with_text"] += bool(record.text.strip())
            if page.base_digest is None:
                counts["added"] += 1
            else:
                counts["unchanged" if _digest(to_native(record)) == page.base_digest else "changed"] += 1
            yield record
        if counts["entities"] == 0:
            reasons = ", ".join(f"{count} {reason}" for reason, count in [*left_out.items(), ("rejected", log.count)])
            raise CatalogError(f"no document became an entity: {reasons}; loosen the filters")

    if config.wikidata is not None:
        atomic_write_bytes(types_path(config.out), to_jsonl(joins.type_parents()))
    elif config.base is not None:
        copy_types(config.base, config.out)
    write_catalog(config.out, records())
    against_base = None
    if config.base is not None:
        against_base = {name: counts[name] for name in ("unchanged", "changed", "added")}
        against_base["removed"] = joins.count("base") - counts["unchanged"] - counts["changed"]
    return CatalogReport(
        catalog=config.out.name,
        documents=documents,
        entities=counts["entities"],
        with_image=counts["with_image"],
        with_text=counts["with_text"],
        left_out=dict(left_out.most_common()),
        rejected=log.count,
        rejects=log.path.name if log.count else "",
        against_base=against_base,
    )


def _record(page: JoinedPage, config: CatalogConfig) -> EntityRecord:
    page_image = page.free_image or (None if config.free_images else page.other_image)
    item_image = page.item_image
    images = []
    if page_image is not None:
        images.append(file_url(site_of(page.wiki), page_image, config.image_width_px))
    if item_image is not None and item_image.replace(" ", "_") != (page_image or "").replace(" ", "_"):
        images.append(file_url(COMMONS, item_image, config.image_width_px))
    record = EntityRecord(
        entity_id=f"Q{page.item}",
        title=page.title,
        text=page.text,
        images=tuple(images),
        url=page.url,
        types=page.types,
        titles={language: page.labels[language] for language in config.titles if language in page.labels},
        description=page.description,
    )
    base = page.base
    if base is None:
        return record
    record = replace(record, symbol=base["symbol"])
    if not config.page_props:
        record = replace(record, images=tuple(base["images"]))
    if base["image_credits"]:
        credits = dict(zip(base["images"], base["image_credits"], strict=True))
        record = replace(record, image_credits=tuple(credits.get(image) for image in record.images))
    if config.wikidata is None:
        record = replace(record, types=tuple(base["types"]), titles=base["titles"], description=base["description"])
    return record
