"""Download every image that a catalog names by URL into tar shards (`wikiclip fetch-images`)."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpcore
from tqdm import tqdm

from catalog import EntityRecord, is_url, read_catalog
from catalog.images import TarShards, image_checker
from core.errors import CatalogError, TooLarge, UndecodableImage, UserError
from core.files import report_disk_full
from core.lines import Rejected, RejectLog
from fetch.download import WORKERS, Downloader, FetchLimits, NotFetched
from imaging import Decoder, sniff

_CONTACT = re.compile(r"(https?://[!-'*-~]+|[!-'*-?A-~]+@[!-'*-~]+\.[!-'*-~]+)")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """The options of `wikiclip fetch-images`. `contact` is an e-mail address or a web page, for the User-Agent."""

    catalog: Path
    out: Path
    contact: str
    limits: FetchLimits = field(default_factory=FetchLimits)
    shard_bytes: int = 128 * 2**20
    images_per_entity: int | None = None
    retry_failed: bool = False
    allow_private: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class FetchReport:
    """What a run did. `known` images had been fetched or had failed before. `rejects` is the log's path, or empty."""

    out: str
    fetched: int
    fetched_bytes: int
    failed: int
    known: int
    rejects: str
    elapsed_s: float


def user_agent(contact: str) -> str:
    """Return the User-Agent header in the form of Wikimedia's policy. Raises `UserError` for an invalid contact.

    https://foundation.wikimedia.org/wiki/Policy:Wikimedia_Foundation_User-Agent_Policy
    """
    if not _CONTACT.fullmatch(contact):
        raise UserError(f"--contact {contact!r} is not a contact; give an e-mail address or the URL of a page")
    return f"wikiclip-serve/{version('wikiclip-serve')} ({contact}) httpcore/{httpcore.__version__}"


def fetch_images(config: FetchConfig) -> FetchReport:
    """Download the images. After an interruption the same call continues; at most one unfinished shard is lost.

    Failures are listed in `rejected.jsonl` in the output folder and retried only with `retry_failed`. Raises
    `CatalogError`, and `UserError` for an invalid contact, a folder that another process fills, or a full disk.
    """
    started = time.perf_counter()
    agent = user_agent(config.contact)
    if not config.catalog.is_file():
        raise CatalogError(f"{config.catalog} does not exist; check --catalog")
    counts: Counter[str] = Counter()
    with report_disk_full(config.out), TarShards(config.out, shard_bytes=config.shard_bytes) as shards:
        if config.retry_failed:
            shards.forget_failures()
        log = RejectLog(config.out / "rejected.jsonl")
        asyncio.run(_fetch_all(config, agent, shards, log, counts))
        for rejected in shards.failures():
            log.add(rejected)
    return FetchReport(
        out=str(config.out),
        fetched=counts["fetched"],
        fetched_bytes=counts["fetched_bytes"],
        failed=counts["failed"],
        known=counts["known"],
        rejects=str(log.path) if log.count else "",
        elapsed_s=round(time.perf_counter() - started, 3),
    )


async def _fetch_all(config: FetchConfig, agent: str, shards: TarShards, log: RejectLog, counts: Counter[str]) -> None:
    decoder = image_checker()
    downloader = Downloader(agent, config.limits, accept="image/*", allow_private=config.allow_private)
    images = _images(config, log)
    in_progress: set[str] = set()

    async def work(bar: tqdm[Any]) -> None:
        for url, record in images:  # the tasks share this iterator
            if url in in_progress or shards.knows(url):
                counts["known"] += 1
                continue
            in_progress.add(url)
            try:
                # MediaWiki redirects the first to the second, which would cost another request of the wiki's rate.
                data = await downloader.get(url.replace("/wiki/Special:FilePath/", "/wiki/Special:Redirect/file/", 1))
                kind = await asyncio.to_thread(_check_image, decoder, data)
                shards.add(url, data, kind, {"entity_id": record.entity_id})
                counts["fetched"] += 1
                counts["fetched_bytes"] += len(data)
            except NotFetched as error:
                shards.fail(url, line=record.line, entity_id=record.entity_id, reason=str(error))
                counts["failed"] += 1
            in_progress.remove(url)
            bar.update()
            bar.set_postfix(failed=counts["failed"], refresh=False)

    try:
        with tqdm(desc="images", unit="image", disable=not config.progress) as bar:
            async with asyncio.TaskGroup() as group:
                for _ in range(WORKERS):
                    group.create_task(work(bar))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first failure cancelled the other tasks
    finally:
        await downloader.aclose()
        decoder.close()


def _check_image(decoder: Decoder, data: bytes) -> str:
    """Return the media type of bytes that decode. Raises `NotFetched`."""
    try:
        decoder.check(data)
    except (UndecodableImage, TooLarge) as error:
        raise NotFetched(error.detail.partition(";")[0]) from error
    kind = sniff(data)
    assert kind is not None, "decode checks the type"
    return kind


def _images(config: FetchConfig, log: RejectLog) -> Iterator[tuple[str, EntityRecord]]:
    """Yield the image URLs of the catalog with their records, in order. A URL may repeat."""
    for record in read_catalog(config.catalog):
        if isinstance(record, Rejected):
            log.add(record)
        elif isinstance(record, EntityRecord):
            for url in [image for image in record.images if is_url(image)][: config.images_per_entity]:
                yield url, record
