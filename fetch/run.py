"""`wikiclip fetch-images`: every image that a catalog names by URL, once, into tar shards."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpcore
from tqdm import tqdm

from catalog import EntityRecord, is_url, read_catalog
from catalog.tar_shards import TarShards
from core.errors import CatalogError, UserError
from core.files import report_disk_full
from core.jsonl import Rejected, RejectLog
from core.network import PublicNetwork
from fetch.download import Downloader, DownloadLimits, NotFetched
from fetch.pace import Pace, PaceLimits

# Enough for the hosts of a catalog to be asked at once; one host is asked by few at a time.
_WORKERS = 16
_CONTACT = re.compile(r"(https?://[!-'*-~]+|[!-'*-?A-~]+@[!-'*-~]+\.[!-'*-~]+)")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """What `wikiclip fetch-images` is told. `contact` is an e-mail address or a page that says who is asking."""

    catalog: Path
    out: Path
    contact: str
    pace: PaceLimits = field(default_factory=PaceLimits)
    limits: DownloadLimits = field(default_factory=DownloadLimits)
    shard_bytes: int = 128 * 2**20
    images_per_entity: int | None = None
    retry_failed: bool = False
    allow_private: bool = False
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class FetchReport:
    """`fetched` and `failed` images of this run, `known` before it came to them; `rejects` names the log, if any."""

    out: str
    fetched: int
    fetched_bytes: int
    failed: int
    known: int
    rejects: str
    elapsed_s: float


@dataclass
class _Counts:
    fetched: int = 0
    fetched_bytes: int = 0
    failed: int = 0
    known: int = 0


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    url: str
    entity_id: str
    line: int


def user_agent(contact: str) -> str:
    """Who is asking, in the form that Wikimedia's User-Agent policy wants. Raises `UserError` without a contact.

    https://foundation.wikimedia.org/wiki/Policy:Wikimedia_Foundation_User-Agent_Policy
    """
    if not _CONTACT.fullmatch(contact):
        raise UserError(f"--contact {contact!r} is no way to reach you; give an e-mail address or the URL of a page")
    return f"wikiclip-serve/{version('wikiclip-serve')} ({contact}) httpcore/{httpcore.__version__}"


def fetch_images(config: FetchConfig) -> FetchReport:
    """Download the images; interrupted at any moment, the same call goes on and loses at most one unfinished shard.

    What is not to be had is told in `rejected.jsonl` in the output folder, and is not asked for again without
    `retry_failed`. Raises `CatalogError`, and `UserError` without a contact, for a folder that another process fills,
    and where the disk is full.
    """
    started = time.perf_counter()
    agent = user_agent(config.contact)
    if not config.catalog.is_file():
        raise CatalogError(f"{config.catalog} does not exist; check --catalog")
    counts = _Counts()
    with report_disk_full(config.out), TarShards(config.out, shard_bytes=config.shard_bytes) as shards:
        if config.retry_failed:
            shards.forget_failures()
        log = RejectLog(config.out / "rejected.jsonl")
        asyncio.run(_fetch_all(config, agent, shards, log, counts))
        for rejected in shards.failures():
            log.add(rejected)
    return FetchReport(
        out=str(config.out),
        fetched=counts.fetched,
        fetched_bytes=counts.fetched_bytes,
        failed=counts.failed,
        known=counts.known,
        rejects=str(log.path) if log.count else "",
        elapsed_s=round(time.perf_counter() - started, 3),
    )


async def _fetch_all(config: FetchConfig, agent: str, shards: TarShards, log: RejectLog, counts: _Counts) -> None:
    downloader = Downloader(
        user_agent=agent,
        pace=Pace(config.pace),
        limits=config.limits,
        network=PublicNetwork(allow_private=config.allow_private),
        connections=_WORKERS,
    )
    wanted = _wanted(config, log)
    under_way: set[str] = set()

    def next_one() -> _Wanted | None:
        """The next image that is neither there nor being fetched."""
        for image in wanted:
            if image.url not in under_way and not shards.knows(image.url):
                under_way.add(image.url)
                return image
            counts.known += 1
        return None

    async def work(bar: tqdm[Any]) -> None:
        while (image := next_one()) is not None:
            try:
                data, kind = await downloader.get(image.url)
                shards.add(image.url, data, kind, {"entity_id": image.entity_id})
                counts.fetched += 1
                counts.fetched_bytes += len(data)
            except NotFetched as error:
                shards.fail(image.url, line=image.line, entity_id=image.entity_id, reason=str(error))
                counts.failed += 1
            under_way.remove(image.url)
            bar.update()
            bar.set_postfix(failed=counts.failed, refresh=False)

    try:
        with tqdm(desc="images", unit="image", disable=not config.progress) as bar:
            async with asyncio.TaskGroup() as group:
                for _ in range(_WORKERS):
                    group.create_task(work(bar))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first that failed stopped the others
    finally:
        await downloader.aclose()


def _wanted(config: FetchConfig, log: RejectLog) -> Iterator[_Wanted]:
    """The images of a catalog that are named by URL, in its order; one may come more than once."""
    for record in read_catalog(config.catalog):
        if isinstance(record, Rejected):
            log.add(record)
        elif isinstance(record, EntityRecord):
            for url in [image for image in record.images if is_url(image)][: config.images_per_entity]:
                yield _Wanted(url=url, entity_id=record.entity_id, line=record.line)
