"""`wikiclip catalog`: a catalog from Wikimedia's public dumps, or an earlier catalog brought up to date by them.

Each dump is read once, in streams, into a work file beside the output (`catalog.joins`); the catalog is written from
that in one go. What a later run is given no dump for is taken over from the base catalog.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from catalog.cirrus import LeftOut, PageFilter, page_of, parse_document, read_documents, site_of
from catalog.compressed import Position, read_lines
from catalog.joins import JoinedPage, Joins
from catalog.page_props import file_url, read_page_images, wiki_of
from catalog.readers import read_catalog
from catalog.records import BadRecord, EntityRecord
from catalog.wikidata import may_be_class, number_of, parse_item
from catalog.writer import catalog_writer, check_catalog_name, to_native
from core.errors import CatalogError, UserError
from core.files import atomic_write_bytes, report_disk_full
from core.jsonl import Rejected, RejectLog

COMMONS = "https://commons.wikimedia.org"
# Wikimedia's own pages about pages: disambiguation pages, lists, categories, templates.
NO_ENTITIES = (4167410, 13406463, 4167836, 11266439)
_COMMIT_EVERY_LINES = 2_000
_PAGE_FILES = ("*.json", "*.json.gz", "*.json.bz2")


@dataclass(frozen=True, kw_only=True)
class CatalogConfig:
    """What `wikiclip catalog` is told. `types` and `without_types` are numbers of items: 42 is Q42.

    `language` None takes articles of any; `titles` are the languages of further titles; `image_width_px` 0 names images
    as they were uploaded.
    """

    content: tuple[Path, ...]
    out: Path
    page_props: tuple[Path, ...] = ()
    wikidata: Path | None = None
    base: Path | None = None
    language: str | None = None
    titles: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    without_types: tuple[int, ...] = NO_ENTITIES
    min_links: int = 0
    max_text: int = 4000
    image_width_px: int = 500
    free_images: bool = False
    resume: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class CatalogReport:
    """What became of every document, and against a base catalog how many entities changed."""

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
    """Write the catalog, and a report beside it as `NAME.report.json`; records that are none go to `rejected.jsonl`.

    Killed at any moment, the same call with `resume` finishes it, with the same bytes. Raises `CatalogError` for a dump
    that cannot be read, `UserError` where the output exists or was begun with other settings.
    """
    started = time.perf_counter()
    report_path = config.out.with_name(f"{config.out.name}.report.json")
    work = config.out.with_name(f".{config.out.name}.work")
    _check(config, work)
    content = _content_files(config.content)
    settings = _settings(config, content)
    if config.out.exists() and not work.exists():
        return _finished(config.out, report_path, settings)
    with report_disk_full(config.out), Joins(work, settings) as joins:
        if config.base is not None:
            _read_base(joins, config.base)
        for path in content:
            _read_content(joins, path, config)
        for path in config.page_props:
            _read_page_props(joins, path, config.progress)
        if config.wikidata is not None:
            _read_wikidata(joins, config.wikidata, config)
        report = _write(joins, config, {path.name for path in content})
        report = replace(report, elapsed_s=round(time.perf_counter() - started, 3))
        atomic_write_bytes(report_path, json.dumps({**asdict(report), "settings": settings}, indent=2).encode())
        joins.remove()
    return report


def _finished(out: Path, report_path: Path, settings: Mapping[str, Any]) -> CatalogReport:
    """The report of a catalog that is there already. Raises `UserError` if it is not the one that is wanted."""
    report = json.loads(report_path.read_bytes()) if report_path.exists() else {}
    if report.pop("settings", None) != settings:
        raise UserError(f"--out {out} exists and was made with other settings; choose another name")
    return CatalogReport(**report)


def _check(config: CatalogConfig, work: Path) -> None:
    check_catalog_name(config.out)
    if not config.resume and work.exists():
        raise UserError(f"--out {config.out} was begun before; finish it with --resume, or remove {work}")
    if not config.resume and config.out.exists():
        raise UserError(f"--out {config.out} exists; choose another name (--base makes a new catalog of an old one)")
    if not config.out.resolve().parent.is_dir():
        raise UserError(f"the folder of --out {config.out} does not exist; make it")
    if (config.types or config.without_types != NO_ENTITIES) and config.wikidata is None:
        raise UserError("choosing types needs --wikidata, which says what each entity is")
    for path in (*config.content, *config.page_props, config.wikidata, config.base):
        if path is not None and not path.exists():
            raise CatalogError(f"{path} does not exist; check the path")


def _content_files(paths: tuple[Path, ...]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        found = sorted(file for pattern in _PAGE_FILES for file in path.glob(pattern)) if path.is_dir() else [path]
        if not found:
            raise CatalogError(f"{path} holds no .json, .json.gz or .json.bz2 file; give the folder of the dump")
        files += found
    if repeated := [name for name, count in Counter(file.name for file in files).items() if count > 1]:
        raise UserError(f"two files of --content are named {repeated[0]}; give each once")
    return files


def _settings(config: CatalogConfig, content: list[Path]) -> dict[str, Any]:
    """All that the catalog depends on. A dump is known by name and size: hashing one takes as long as reading it."""

    def known(path: Path | None) -> list[Any] | None:
        return None if path is None else [path.name, path.stat().st_size]

    return {
        "content": [known(path) for path in content],
        "page props": [known(path) for path in config.page_props],
        "wikidata": known(config.wikidata),
        "base": known(config.base),
        "language": config.language,
        "titles": list(config.titles),
        "types": list(config.types),
        "without types": list(config.without_types),
        "min links": config.min_links,
        "max text": config.max_text,
        "image width": config.image_width_px,
        "free images": config.free_images,
    }


class _Reading:
    """One dump being read: its progress bar, and how far it came."""

    def __init__(self, joins: Joins, source: str, path: Path, bar: tqdm[Any]) -> None:
        self._joins = joins
        self._source = source
        self._path = path
        self._bar = bar
        self.start, self.done = joins.reached(source)
        self._reached = self._committed = self.start
        if not self.done:
            bar.update(self.start.offset)

    def on_bytes(self, count: int) -> None:
        self._bar.update(count)

    def reject(self, reason: str, line: int, record: bytes) -> None:
        excerpt = record[:2000].decode("utf-8", "replace").strip()[:500]
        self._joins.reject(self._path.name, Rejected(line=line, reason=reason, record=excerpt))

    def reached(self, position: Position) -> None:
        """All up to here has been taken in."""
        self._reached = position
        if position.line - self._committed.line >= _COMMIT_EVERY_LINES:
            self._joins.set_reached(self._source, position)
            self._committed = position

    def finish(self) -> None:
        self._joins.set_reached(self._source, self._reached, done=True)


@contextmanager
def _reading(joins: Joins, stage: str, path: Path, progress: bool) -> Iterator[_Reading]:
    with tqdm(
        desc=f"{stage} {path.name}", unit="B", unit_scale=True, total=path.stat().st_size, disable=not progress
    ) as bar:
        reading = _Reading(joins, f"{stage} {path.name}", path, bar)
        yield reading
        if not reading.done:
            reading.finish()


def _read_base(joins: Joins, path: Path) -> None:
    """Take in the base catalog, all of it or nothing."""
    _, done = joins.reached("base")
    if done:
        return
    for item in read_catalog(path):
        if isinstance(item, EntityRecord):
            row = to_native(item)
            kept = {name: row[name] for name in ("images", "types", "titles", "symbol", "description")}
            joins.add_base(item.entity_id, _digest(row), kept)
    joins.set_reached("base", Position(), done=True)


def _digest(row: Mapping[str, Any]) -> bytes:
    return hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).digest()


def _read_content(joins: Joins, path: Path, config: CatalogConfig) -> None:
    wanted = PageFilter(language=config.language, min_links=config.min_links)
    with _reading(joins, "content", path, config.progress) as reading:
        if reading.done:
            return
        for page_id, line, position in read_documents(path, reading.start, reading.on_bytes):
            try:
                if not joins.add_page(page_of(parse_document(line), page_id, wanted, config.max_text)):
                    joins.leave_out("a document before it is about the same entity")
            except LeftOut as reason:
                joins.leave_out(str(reason))
            except BadRecord as error:
                reading.reject(str(error), position.line, line)
            reading.reached(position)


def _read_page_props(joins: Joins, path: Path, progress: bool) -> None:
    wiki = wiki_of(path)
    with _reading(joins, "page props", path, progress) as reading:
        if reading.done:
            return
        for images, position in read_page_images(path, reading.start, reading.on_bytes):
            joins.add_page_images(wiki, images)
            reading.reached(position)


def _read_wikidata(joins: Joins, path: Path, config: CatalogConfig) -> None:
    languages = tuple(dict.fromkeys((config.language or "en", *config.titles)))
    with _reading(joins, "wikidata", path, config.progress) as reading:
        if reading.done:
            return
        for line, position in read_lines(path, reading.start, reading.on_bytes):
            number = number_of(line)
            # Of 115 million items a tenth is needed: the others are not even parsed.
            if number is None or may_be_class(line) or joins.has_item(number):
                try:
                    item = parse_item(line, languages)
                    if item is not None and joins.has_item(item.number):
                        joins.add_item(item)
                    if item is not None and item.superclasses:
                        joins.add_class(item, item.labels.get(languages[0]))
                except BadRecord as error:
                    reading.reject(str(error), position.line, line)
            reading.reached(position)


def _write(joins: Joins, config: CatalogConfig, content_names: Collection[str]) -> CatalogReport:
    log = RejectLog(config.out.with_name("rejected.jsonl"))
    documents = joins.page_count() + sum(joins.left_out().values())
    for source, rejected in joins.rejected():
        documents += source in content_names
        log.add(Rejected(line=rejected.line, reason=f"{source}: {rejected.reason}", record=rejected.record))
    left_out = Counter(joins.left_out())
    unwanted = _type_filter(joins, config)
    counts: Counter[str] = Counter()
    with (
        catalog_writer(config.out) as write,
        tqdm(desc="writing", unit="entity", total=joins.page_count(), disable=not config.progress) as bar,
    ):
        for joined in joins.joined():
            bar.update()
            if (reason := unwanted(joined.page.item)) is not None:
                left_out[reason] += 1
                continue
            record = _record(joined, config)
            counts["entities"] += 1
            counts["with_image"] += bool(record.images)
            counts["with_text"] += bool(record.text.strip())
            if joined.base_digest is None:
                counts["added"] += 1
            else:
                counts["unchanged" if _digest(to_native(record)) == joined.base_digest else "changed"] += 1
            write(record)
        if counts["entities"] == 0:
            raise CatalogError(f"no document became an entity: {_why(left_out, log.count)}; loosen the filters")
    against_base = None
    if config.base is not None:
        against_base = {name: counts[name] for name in ("unchanged", "changed", "added")}
        against_base["removed"] = joins.base_count() - counts["unchanged"] - counts["changed"]
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


def _why(left_out: Mapping[str, int], rejected: int) -> str:
    return ", ".join([*(f"{count} {reason}" for reason, count in left_out.items()), f"{rejected} rejected"])


def _type_filter(joins: Joins, config: CatalogConfig) -> Callable[[int], str | None]:
    """What says why an item's types keep it out, or None."""
    if config.wikidata is None:
        return lambda item: None
    joins.name_classes("wanted_types", config.types)
    joins.name_classes("unwanted_types", config.without_types)

    def reason(item: int) -> str | None:
        if joins.is_among(item, "unwanted_types"):
            return "of a type that is left out"
        if config.types and not joins.is_among(item, "wanted_types"):
            return "of none of the wanted types"
        return None

    return reason


def _record(joined: JoinedPage, config: CatalogConfig) -> EntityRecord:
    page = joined.page
    base = joined.base or {}
    keeps_items = config.wikidata is None and joined.base is not None
    keeps_images = not config.page_props and joined.base is not None
    titles = {language: joined.labels[language] for language in config.titles if language in joined.labels}
    return EntityRecord(
        entity_id=f"Q{page.item}",
        title=page.title,
        text=page.text,
        images=tuple(base["images"]) if keeps_images else _images(joined, config),
        url=page.url,
        types=tuple(base["types"]) if keeps_items else joined.types,
        titles=base["titles"] if keeps_items else titles,
        symbol=base.get("symbol"),
        description=base["description"] if keeps_items else joined.description,
    )


def _images(joined: JoinedPage, config: CatalogConfig) -> tuple[str, ...]:
    site = site_of(joined.page.wiki)
    page_image = joined.free_image or (None if config.free_images else joined.other_image)
    urls = [] if page_image is None else [file_url(site, page_image, config.image_width_px)]
    if joined.item_image is not None and joined.item_image.replace(" ", "_") != (page_image or "").replace(" ", "_"):
        urls.append(file_url(COMMONS, joined.item_image, config.image_width_px))
    return tuple(urls)
