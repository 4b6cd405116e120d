"""Add the authors and licences of Wikimedia's images to a catalog (`wikiclip credits`).

The dumps of articles and items do not have them. The API of a wiki answers for 50 files at a time, its own or Commons',
what their description pages say: https://www.mediawiki.org/wiki/Extension:CommonsMetadata
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

from tqdm import tqdm

from catalog import EntityRecord, is_url, read_catalog
from catalog.formats import check_catalog_name, copy_types, write_catalog
from catalog.joins import open_work
from catalog.records import ImageCredit
from core.errors import CatalogError, UserError
from core.files import report_disk_full
from core.lines import RejectLog
from fetch.download import Downloader, FetchLimits, NotFetched
from fetch.run import user_agent

DEFAULT_LIMITS = FetchLimits(connections=1, requests_per_s=1.0, retries=8, backoff_s=2.0)
FILES_PER_REQUEST = 50  # the API's limit for clients without an account
_MAX_TITLES_BYTES = 6000  # keeps the URL of a request short enough for every proxy
_FILE_URL = re.compile(r"(https?://[^/?#]+)/wiki/Special:FilePath/([^/?#]+)")
_QUERY = {
    "action": "query",
    "format": "json",
    "formatversion": "2",
    "maxlag": "5",  # the servers refuse the request while they are busy
    "redirects": "1",
    "prop": "imageinfo",
    "iiprop": "url|extmetadata",
    "iiextmetadatafilter": "Artist|Attribution|LicenseShortName|LicenseUrl",
}
_HIDDEN = re.compile(r"<(style|script)\b.*?</\1>|<(\w+)[^>]*display:\s*none.*?</\2>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_SCHEMA = """
PRAGMA locking_mode = EXCLUSIVE;
CREATE TABLE IF NOT EXISTS files (url TEXT PRIMARY KEY, site TEXT, name TEXT, asked INTEGER, credit TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unasked ON files (site) WHERE NOT asked;
BEGIN EXCLUSIVE;
"""


@dataclass(frozen=True, kw_only=True)
class CreditsConfig:
    """The options of `wikiclip credits`. `contact` is an e-mail address or a web page, for the User-Agent."""

    catalog: Path
    out: Path
    contact: str
    limits: FetchLimits = DEFAULT_LIMITS
    allow_private: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class CreditsReport:
    """What a run did. `images` counts those of Wikimedia without a credit in the catalog, `credited` those found."""

    catalog: str
    images: int
    credited: int
    requests: int
    rejected: int
    elapsed_s: float


def add_credits(config: CreditsConfig) -> CreditsReport:
    """Write the catalog with the credits of its images. After an interruption the same call continues.

    Images that have a credit keep it. Raises `CatalogError`, and `UserError` for an invalid contact or output, or if a
    wiki cannot be asked.
    """
    started = time.perf_counter()
    agent = user_agent(config.contact)
    check_catalog_name(config.out)
    if config.out.exists():
        raise UserError(f"--out {config.out} exists; choose another name")
    work = config.out.with_name(f".{config.out.name}.work")
    log = RejectLog(config.out.with_name("rejected.jsonl"))
    with report_disk_full(config.out), open_work(work, _SCHEMA) as db:
        for item in read_catalog(config.catalog):
            if isinstance(item, EntityRecord):
                db.executemany("INSERT OR IGNORE INTO files VALUES (?, ?, ?, 0, NULL)", _uncredited(item))
            else:
                log.add(item)
        db.execute("COMMIT")
        requests = asyncio.run(_ask_all(config, agent, db))
        copy_types(config.catalog, config.out)
        write_catalog(config.out, _with_credits(config, db))
        images, credited = db.execute("SELECT count(*), count(credit) FROM files").fetchone()
    work.unlink()
    return CreditsReport(
        catalog=str(config.out),
        images=images,
        credited=credited,
        requests=requests,
        rejected=log.count,
        elapsed_s=round(time.perf_counter() - started, 3),
    )


def _uncredited(record: EntityRecord) -> Iterator[tuple[str, str, str]]:
    """Yield the URL, site and file name of each of Wikimedia's images without a credit."""
    credits = record.image_credits or [None] * len(record.images)
    for url, credit in zip(record.images, credits, strict=True):
        if credit is None and (found := _FILE_URL.match(url)):
            yield url, found[1], unquote(found[2]).replace("_", " ")


def _with_credits(config: CreditsConfig, db: sqlite3.Connection) -> Iterator[EntityRecord]:
    for item in read_catalog(config.catalog):
        if not isinstance(item, EntityRecord):
            continue
        credits = list(item.image_credits or [None] * len(item.images))
        for place, image in enumerate(item.images):
            found = db.execute("SELECT credit FROM files WHERE url = ?", (image,)).fetchone()
            if credits[place] is None and found is not None and found[0] is not None:
                credits[place] = json.loads(found[0])
        folder = config.out.parent
        images = tuple(image if is_url(image) else os.path.relpath(image, folder) for image in item.images)
        yield replace(item, images=images, image_credits=tuple(credits))


async def _ask_all(config: CreditsConfig, agent: str, db: sqlite3.Connection) -> int:
    """Ask each wiki about its files, one request after the other, and return the number of requests."""
    downloader = Downloader(agent, config.limits, accept="application/json", allow_private=config.allow_private)
    (left,) = db.execute("SELECT count(*) FROM files WHERE NOT asked").fetchone()
    sites = db.execute("SELECT DISTINCT site FROM files WHERE NOT asked ORDER BY site").fetchall()
    requests = 0
    try:
        with tqdm(desc="credits", unit="image", total=left, disable=not config.progress) as bar:
            for (site,) in sites:
                while batch := _next_batch(db, site):
                    credits = await _ask(downloader, site, [name for _, name in batch])
                    rows = ((json.dumps(credits[name]) if name in credits else None, url) for url, name in batch)
                    db.execute("BEGIN")
                    db.executemany("UPDATE files SET asked = 1, credit = ? WHERE url = ?", rows)
                    db.execute("COMMIT")
                    requests += 1
                    bar.update(len(batch))
    finally:
        await downloader.aclose()
    return requests


def _next_batch(db: sqlite3.Connection, site: str) -> list[tuple[str, str]]:
    """Return URL and file name of the next files of a site, as many as fit in a request."""
    query = "SELECT url, name FROM files WHERE site = ? AND NOT asked ORDER BY url LIMIT ?"
    batch: list[tuple[str, str]] = []
    size = 0
    for url, name in db.execute(query, (site, FILES_PER_REQUEST)).fetchall():
        size += len(urlencode({"": name}))
        if batch and size > _MAX_TITLES_BYTES:
            break
        batch.append((url, name))
    return batch


async def _ask(downloader: Downloader, site: str, names: Sequence[str]) -> dict[str, ImageCredit]:
    """Return the credits of those of a site's files that have any, by name. Raises `UserError`."""
    titles = dict.fromkeys(f"File:{name}" for name in names)
    asked = {**_QUERY, "titles": "|".join(titles)}
    found: dict[str, ImageCredit] = {}
    moved: dict[str, str] = {}
    more: dict[str, str] | None = {}
    try:
        while more is not None:
            url = f"{site}/w/api.php?{urlencode({**asked, **more})}"
            answer = json.loads(await downloader.get(url, _refusal))
            for step in (*answer["query"].get("normalized", ()), *answer["query"].get("redirects", ())):
                start = unquote(step["from"]) if step.get("fromencoded") else step["from"]
                moved[start] = step["to"]
            for page in answer["query"].get("pages", ()):
                if page.get("imageinfo") and (credit := parse_credit(page["imageinfo"][0])):
                    found[page["title"]] = credit
            more = answer.get("continue")
    except NotFetched as error:
        raise UserError(f"{site} cannot be asked: {error}; run the same command again to continue") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CatalogError(f"{site}/w/api.php does not answer as MediaWiki does: {type(error).__name__}") from error
    credits = {}
    for name in names:
        title, steps = f"File:{name}", dict(moved)
        while title in steps:
            title = steps.pop(title)
        if title in found:
            credits[name] = found[title]
    return credits


def _refusal(data: bytes) -> str | None:
    """Return why the API does not answer, if it does not. Its refusals have status 200."""
    answer = json.loads(data)
    return f"the API answered {answer['error']['code']}" if "error" in answer else None


def parse_credit(image_info: Mapping[str, Any]) -> ImageCredit:
    """Return what the API knows of a file's author and licence, as plain text. May be empty."""
    facts = {name: str(fact["value"]) for name, fact in (image_info.get("extmetadata") or {}).items()}
    licence_url = facts.get("LicenseUrl", "")
    credit = {
        "author": _text(facts.get("Attribution") or facts.get("Artist", "")),
        "licence": _text(facts.get("LicenseShortName", "")),
        "licence_url": f"https:{licence_url}" if licence_url.startswith("//") else licence_url,
        "source": image_info.get("descriptionurl", ""),
    }
    if not credit["author"] and not credit["licence"]:
        return {}
    return {name: value for name, value in credit.items() if value}


def _text(value: str) -> str:
    """Return the visible text of HTML, on one line."""
    return " ".join(html.unescape(_TAG.sub(" ", _HIDDEN.sub(" ", value))).split())
