"""Command `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.option(
    "--catalog", type=_PATH, required=True, help="Entity records: JSONL(.gz), Parquet, OVEN's or E-VQA's file."
)
@click.option("--checkpoint", type=_PATH, required=True, help="Folder written by `wikiclip train`.")
@click.option("--out", type=_PATH, required=True, help="Folder for the bundle, new or empty.")
@click.option("--resume", is_flag=True, help="Finish an export that was interrupted; begins one where there is none.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only this many entities from the catalog.  [default: all]"
)
@click.option(
    "--shard-size",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Entities in a shard, the unit of work that an interruption can cost.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Images in a pass of the models."
)
@click.option(
    "--validation", type=_PATH, help="Labelled queries (JSONL) to fit confidence and abstaining on.  [default: none]"
)
@click.option("--name", help="Name of the bundle.  [default: name of the output folder]")
@click.option(
    "--thumbnails",
    "thumbnail_px",
    type=click.IntRange(min=0, max=1024),
    default=0,
    show_default=True,
    help="Longer side in pixels of a thumbnail kept for each entity; 0: none.",
)
@click.option(
    "--half/--no-half",
    default=True,
    show_default=True,
    help="Store the image encoder's weights in float16 where that moves no embedding.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Add the image encoder in int8, for queries on a CPU, and measure what that costs.",
)
@click.option("--float16", is_flag=True, help="Add the image encoder computing in float16, for queries on a GPU.")
@click.option(
    "--live", is_flag=True, help="Add what embeds entities that are put while serving; with --resume to a whole bundle."
)
@click.option("--store-text", is_flag=True, help="Keep the entities' text in the bundle.")
@click.option(
    "--images", type=_PATH, help="Folder written by `wikiclip fetch-images`, for images by URL.  [default: none]"
)
@click.option("--image-root", type=_PATH, help="Folder that holds OVEN's wikipedia_images_full.  [default: none]")
@click.option(
    "--image-encoder", metavar="SPEC", help="Where the checkpoint's image encoder lies.  [default: as it says]"
)
@click.option("--text-encoder", metavar="SPEC", help="Where the checkpoint's text encoder lies.  [default: as it says]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where the models run; auto: a GPU if there is one.",
)
@click.option(
    "--base", type=_PATH, help="A bundle to copy from what has the same text, images and models.  [default: none]"
)
@click.option(
    "--workers", type=click.IntRange(min=1, max=256), help="Processes that decode images.  [default: one a core]"
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: on all machines of a Ray cluster (extra `ray`), the one that RAY_ADDRESS names.",
)
@click.option("--trust-remote-code", is_flag=True, help="Let `hf:` encoders run code that comes with their weights.")
@click.option(
    "--dry-run", is_flag=True, help="Write nothing; say what it will take, from the whole catalog and a timed sample."
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def export(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Write a servable bundle, with an exact index, from a catalog and a checkpoint.

    Killed at any moment, --resume finishes it; the result is that of an undisturbed run.
    """
    from dataclasses import asdict

    from export.config import ExportConfig
    from export.pipeline import export_bundle
    from index.report import int8_line, parity_line

    config = ExportConfig(**options, progress=True)
    if dry_run:
        from export.plan import plan_export, plan_lines

        plan = plan_export(config)
        click.echo(json.dumps(asdict(plan)) if as_json else "\n".join(plan_lines(plan, config)))
        return
    summary = export_bundle(config)
    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return
    counts = summary.counts
    if summary.already_complete:
        click.echo(f"{summary.bundle} is complete already, nothing to do")
    click.echo(
        f"bundle {summary.bundle} ({summary.fingerprint}): {counts.entities} entities, {counts.embeddings} embeddings, "
        f"{counts.without_image} without an image, {counts.without_text} without text; "
        f"{summary.shards} shards, {summary.resumed_shards} of them from an earlier run; {summary.elapsed_s:.1f} s"
    )
    if summary.int8 is not None:
        click.echo(f"int8: {int8_line(asdict(summary.int8))}")
    if summary.float16 is not None:
        click.echo(f"float16: {parity_line(asdict(summary.float16))}")
    if options["base"] is not None:
        why = "" if summary.base_fits else ": other models or thumbnails made it, or it keeps no texts"
        click.echo(f"{summary.copied_entities} entities copied from {options['base']}{why}")
    if summary.stages_s:
        click.echo("seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary.stages_s.items()))
    if summary.rejects:
        click.echo(
            f"{counts.rejected} record(s) rejected, {counts.images_failed} image(s) not used, see {summary.rejects}"
        )
