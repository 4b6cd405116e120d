"""Commands `fetch-images` and `credits`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_MEGABYTE = 2**20


@click.command(name="fetch-images", context_settings={"show_default": True})
@click.option("--catalog", type=_PATH, required=True, help="Entity records whose images are URLs.")
@click.option("--out", type=_PATH, required=True, help="Folder for the tar shards. Images already there are kept.")
@click.option("--contact", required=True, help="Your e-mail address or web page, sent to every server.")
@click.option("--connections", type=click.IntRange(min=1), default=2, help="Parallel requests per host.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=5.0, help="Requests per second and host.")
@click.option(
    "--max-mbps", type=click.FloatRange(min=0, min_open=True), default=25.0, help="Megabits per second and host."
)
@click.option("--max-mb", type=click.IntRange(min=1), default=20, help="Largest image, in MiB.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, help="Seconds per attempt.")
@click.option("--retries", type=click.IntRange(min=0), default=5, help="Retries, with exponential backoff.")
@click.option("--shard-mb", type=click.IntRange(min=1), default=128, help="MiB per shard, held in memory.")
@click.option("--images-per-entity", type=click.IntRange(min=1), help="Images per entity. [default: all]")
@click.option("--retry-failed", is_flag=True, help="Retry images that failed in earlier runs.")
@click.option("--allow-private", is_flag=True, help="Allow addresses of this machine and of private networks.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def fetch_images(
    connections: int,
    rate: float,
    max_mbps: float,
    max_mb: int,
    timeout: float,
    retries: int,
    shard_mb: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Download the images of a catalog into tar shards, within Wikimedia's rate limits.

    After an interruption, run the same command again to continue.
    """
    from fetch.download import FetchLimits
    from fetch.run import FetchConfig
    from fetch.run import fetch_images as run

    report = run(
        FetchConfig(
            limits=FetchLimits(
                connections=connections,
                requests_per_s=rate,
                bits_per_s=max_mbps * 1e6,
                max_bytes=max_mb * _MEGABYTE,
                timeout_s=timeout,
                retries=retries,
            ),
            shard_bytes=shard_mb * _MEGABYTE,
            progress=True,
            **options,
        )
    )
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    click.echo(
        f"{report.out}: {report.fetched} images fetched ({report.fetched_bytes / _MEGABYTE:.1f} MiB), "
        f"{report.failed} failed, {report.known} known from earlier; {report.elapsed_s:.1f} s"
    )
    if report.rejects:
        click.echo(f"see {report.rejects}")


@click.command(name="credits", context_settings={"show_default": True})
@click.option("--catalog", type=_PATH, required=True, help="Entity records with Wikimedia's images.")
@click.option("--out", type=_PATH, required=True, help="The catalog with credits: .jsonl, .jsonl.gz or .parquet.")
@click.option("--contact", required=True, help="Your e-mail address or web page, sent to every server.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Requests per second.")
@click.option("--allow-private", is_flag=True, help="Allow addresses of this machine and of private networks.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def add_credits(rate: float, as_json: bool, **options: Any) -> None:
    """Add authors and licences of Wikimedia's images to a catalog, asking for 50 files per request.

    Credits that are already in the catalog are kept. After an interruption, run the same command again to continue.
    """
    from fetch.credits import DEFAULT_LIMITS, CreditsConfig
    from fetch.credits import add_credits as run

    report = run(CreditsConfig(limits=replace(DEFAULT_LIMITS, requests_per_s=rate), progress=True, **options))
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    click.echo(
        f"{report.catalog}: {report.credited} of {report.images} images have an author or a licence; "
        f"{report.requests} requests, {report.elapsed_s:.1f} s"
    )
    if report.rejected:
        click.echo(f"{report.rejected} record(s) rejected, see {options['out'].with_name('rejected.jsonl')}")
