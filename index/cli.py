"""Commands `index` and `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

_BUNDLE = click.Path(path_type=Path)


@click.command()
@click.option("--bundle", type=_BUNDLE, required=True, help="Folder of the bundle whose index is rebuilt.")
@click.option(
    "--factory",
    default="auto",
    show_default=True,
    help="A faiss factory string, as Flat, HNSW32 or IVF256,SQ8; auto: exact search (Flat).",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to build; auto: a GPU if faiss has one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the index manifest as one JSON object.")
def index(bundle: Path, factory: str, device: str, as_json: bool) -> None:
    """Rebuild the search index of a bundle: index/entity.faiss and index/manifest.json."""
    from dataclasses import asdict

    from index.build import build_index
    from index.bundle import open_embeddings, open_manifest

    # Not Bundle.open: a broken index must not stand in the way of its own repair.
    embeddings = open_embeddings(bundle, open_manifest(bundle))
    manifest = build_index(bundle, embeddings, factory=factory, device=device, progress=True)
    if as_json:
        click.echo(json.dumps(asdict(manifest)))
    else:
        click.echo(
            f"indexed {manifest.count} embeddings of width {manifest.dim} as {manifest.factory}: "
            f"{manifest.bytes / 1e6:.1f} MB in {manifest.elapsed_s:.1f} s ({manifest.why})"
        )


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--verify", is_flag=True, help="Hash every byte of every file, not only files up to 64 MiB.")
@click.option("--json", "as_json", is_flag=True, help="Print what the bundle holds as one JSON object.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Say what a bundle holds, and whether it is whole; exit 2 if it is not."""
    from index.report import describe, describe_lines

    report = describe(bundle, verify="full" if verify else "quick")
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        click.echo("\n".join(describe_lines(report)))
