"""Command `fetch-images`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)
_MEGABYTE = 2**20


@click.command(name="fetch-images", context_settings={"show_default": True})
@click.option("--catalog", type=_PATH, required=True, help="Entity records whose images are URLs.")
@click.option("--out", type=_PATH, required=True, help="Folder for the tar shards; what is there already is kept.")
@click.option("--contact", required=True, help="Your e-mail address or page, told to every server that is asked.")
@click.option(
    "--connections", type=click.IntRange(min=1), default=2, help="Requests under way at a time, to each host."
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), default=5.0, help="Requests per second, to each host."
)
@click.option(
    "--max-mbps", type=click.FloatRange(min=0, min_open=True), default=25.0, help="Megabits per second, from each host."
)
@click.option("--max-mb", type=click.IntRange(min=1), default=20, help="Largest image to take, in MiB.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, help="Seconds that one attempt may take."
)
@click.option("--retries", type=click.IntRange(min=0), default=5, help="Attempts after the first, ever further apart.")
@click.option("--shard-mb", type=click.IntRange(min=1), default=128, help="Size of a shard in MiB, held in memory.")
@click.option(
    "--images-per-entity", type=click.IntRange(min=1), help="Take only so many images of an entity. [default: all]"
)
@click.option("--retry-failed", is_flag=True, help="Try again what was not to be had in earlier runs.")
@click.option("--allow-private", is_flag=True, help="Let addresses of this machine and its networks be asked.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def fetch_images(
    catalog: Path,
    out: Path,
    contact: str,
    connections: int,
    rate: float,
    max_mbps: float,
    max_mb: int,
    timeout: float,
    retries: int,
    shard_mb: int,
    images_per_entity: int | None,
    retry_failed: bool,
    allow_private: bool,
    as_json: bool,
) -> None:
    """Download the images of a catalog into tar shards, at a pace that Wikimedia allows.

    Killed at any moment, the same command goes on.
    """
    from fetch.download import DownloadLimits
    from fetch.pace import PaceLimits
    from fetch.run import FetchConfig
    from fetch.run import fetch_images as run

    report = run(
        FetchConfig(
            catalog=catalog,
            out=out,
            contact=contact,
            pace=PaceLimits(connections=connections, requests_per_s=rate, bits_per_s=max_mbps * 1e6),
            limits=DownloadLimits(max_bytes=max_mb * _MEGABYTE, timeout_s=timeout, retries=retries),
            shard_bytes=shard_mb * _MEGABYTE,
            images_per_entity=images_per_entity,
            retry_failed=retry_failed,
            allow_private=allow_private,
            progress=True,
        )
    )
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    click.echo(
        f"{out}: {report.fetched} images fetched ({report.fetched_bytes / _MEGABYTE:.1f} MiB), "
        f"{report.failed} not to be had, {report.known} known before; {report.elapsed_s:.1f} s"
    )
    if report.rejects:
        click.echo(f"see {report.rejects}")
