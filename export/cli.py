"""Command `export`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from export.config import ExportConfig
    from export.pipeline import ExportSummary

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)


@click.command(context_settings={"show_default": True})
@click.option(
    "--catalog", type=_PATH, required=True, help="Entity records: JSONL(.gz), Parquet, OVEN's or E-VQA's file."
)
@click.option(
    "--checkpoint",
    type=_PATH,
    help="Folder written by `wikiclip train`.  [default: none; entities get the embeddings of their images]",
)
@click.option("--out", type=_PATH, required=True, help="New or empty folder for the bundle.")
@click.option("--resume", is_flag=True, help="Finish an interrupted export, or begin one.")
@click.option("--limit", type=_COUNT, help="Export only the first entities of the catalog.  [default: all]")
@click.option("--shard-size", type=_COUNT, default=4096, help="Entities per shard. An interruption loses at most one.")
@click.option("--batch-size", type=_COUNT, default=32, help="Images per batch of the models.")
@click.option(
    "--validation",
    type=_PATH,
    help="Labelled queries (JSONL), or a service's feedback, to fit confidence on.  [default: none]",
)
@click.option(
    "--remember",
    type=_PATH,
    help="Labelled pictures (JSONL, or OVEN's files) to keep as reference vectors. With --checkpoint, it needs "
    "--validation.  [default: none]",
)
@click.option(
    "--type-parents",
    type=_PATH,
    help='Parents of types, JSONL: {"type": ..., "parents": [...]}.  [default: the file that `wikiclip catalog` wrote '
    "next to the catalog, if any]",
)
@click.option("--name", help="Name of the bundle.  [default: the output folder's]")
@click.option(
    "--thumbnails",
    "thumbnail_px",
    type=click.IntRange(min=0, max=1024),
    default=0,
    help="Longer side of each entity's thumbnail, in pixels. 0: no thumbnails.",
)
@click.option(
    "--half/--no-half", default=True, help="Store the encoder's weights in float16 if that changes no embedding."
)
@click.option("--int8", is_flag=True, help="Add an int8 image encoder, for queries on a CPU, and measure its accuracy.")
@click.option("--float16", is_flag=True, help="Add an image encoder that computes in float16, for queries on a GPU.")
@click.option(
    "--live", is_flag=True, help="Add the entity encoder, for edits while serving; with --resume at any time."
)
@click.option("--store-text", is_flag=True, help="Store the entities' texts in the bundle.")
@click.option("--images", type=_PATH, help="Folder of `wikiclip fetch-images`, for images by URL.  [default: none]")
@click.option("--image-root", type=_PATH, help="Folder that contains OVEN's wikipedia_images_full.  [default: none]")
@click.option(
    "--image-encoder", metavar="SPEC", help="Image encoder, required without --checkpoint.  [default: the checkpoint's]"
)
@click.option("--text-encoder", metavar="SPEC", help="The checkpoint's text encoder.  [default: as recorded in it]")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Device of the models. auto: a GPU if any.",
)
@click.option(
    "--base", type=_PATH, help="Earlier bundle, to copy the image encoder and unchanged entities from.  [default: none]"
)
@click.option("--workers", type=click.IntRange(1, 256), help="Image decoding processes.  [default: one per core]")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="ray: on all machines of the Ray cluster at RAY_ADDRESS (extra `ray`).",
)
@click.option("--revision", help="Branch, tag or commit of the one hf: encoder given; or write hf:ID@REVISION.")
@click.option("--trust-remote-code", is_flag=True, help="Allow `hf:` encoders to run code from their repositories.")
@click.option("--dry-run", is_flag=True, help="Write nothing. Estimate size and time from a timed sample.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def export(as_json: bool, dry_run: bool, revision: str | None, **options: Any) -> None:
    """Write a servable bundle with an exact index from a catalog and a checkpoint, or an image encoder alone.

    --resume finishes an interrupted export, with the same result as an uninterrupted one.
    """
    from dataclasses import asdict

    from core.runtime import keep_freed_memory
    from export.config import ExportConfig
    from export.pipeline import export_bundle
    from index.manifest import Record
    from model.encoders import with_revision

    specs = ("image_encoder", "text_encoder")
    options |= zip(specs, with_revision(revision, *map(options.get, specs)), strict=True)
    config = ExportConfig(**options, progress=True)
    if dry_run:
        from export.estimate import estimate_export, estimate_lines

        estimate = estimate_export(config)
        click.echo(json.dumps(asdict(estimate)) if as_json else "\n".join(estimate_lines(estimate, config)))
        return
    keep_freed_memory()
    summary = export_bundle(config)
    if as_json:
        click.echo(json.dumps(asdict(summary), default=Record.model_dump))
        return
    click.echo("\n".join(summary_lines(summary, config)))


def summary_lines(summary: ExportSummary, config: ExportConfig) -> Iterator[str]:
    """Yield what an export made or found as lines of text."""
    from index.manifest import MANIFEST_FILE, Manifest
    from index.report import int8_line, parity_line, remembered_line, self_check_lines

    counts = summary.counts
    if summary.already_complete:
        yield f"{summary.bundle} is already complete"
    yield (
        f"bundle {summary.bundle} ({summary.fingerprint}): {counts.entities} entities, {counts.embeddings} embeddings, "
        f"{counts.without_image} without an image, {counts.without_text} without text; "
        f"{summary.shards} shards, {summary.resumed_shards} from an earlier run; {summary.elapsed_s:.1f} s"
    )
    if not summary.trained and counts.without_image:
        yield f"{counts.without_image} entities have no image: their records are stored, but never recognised"
    if (types := config.type_parents_file) is not None:
        yield f"parents of types are from {types}"
    if summary.pooling == "mean":
        yield "entities are found by the mean of their images"
    if summary.remembered is not None:
        yield remembered_line(summary.remembered.model_dump())
    elif config.remember is not None:
        yield f"nothing remembered of {config.remember}: no handicap finds more queries without losing held-out ones"
    if summary.self_check is not None:
        yield from self_check_lines(summary.self_check)
    if summary.added_entity_encoder:
        yield "entity encoder added: the service can embed entities that are put"
    elif config.live:
        yield (
            "nothing added for --live: the entity encoder was there"
            if summary.trained
            else "nothing added for --live: without a checkpoint, the image encoder embeds entities that are put"
        )
    if summary.int8 is not None:
        yield f"int8: {int8_line(summary.int8.model_dump())}"
    if summary.float16 is not None:
        yield f"float16: {parity_line(summary.float16.model_dump())}"
    if config.base is not None:
        why = "" if summary.base_fits else " (its models or thumbnails differ, or it has no texts)"
        yield f"{summary.copied_entities} entities copied from {config.base}{why}"
        if config.remember is None and Manifest.read(config.base / MANIFEST_FILE).remembered is not None:
            yield "what the base remembers is not copied: give --remember again"
    if summary.stages_s:
        yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary.stages_s.items())
    if summary.rejects and (counts.rejected or counts.images_failed or not config.rejected):
        yield f"{counts.rejected} record(s) rejected, {counts.images_failed} image(s) not used, see {summary.rejects}"
