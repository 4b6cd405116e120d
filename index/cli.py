"""Commands `index`, `inspect` and `bundle`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from index.transfer import Transferred

_BUNDLE = click.Path(path_type=Path)


@click.command()
@click.option("--bundle", type=_BUNDLE, required=True, help="Folder of the bundle whose index is rebuilt.")
@click.option(
    "--factory",
    default="auto",
    show_default=True,
    help="A faiss factory string, as Flat, HNSW32 or IVF256,SQ8; auto: the first that meets the three targets, by "
    "measurement: exact search, lists of codes, codes alone or a graph.",
)
@click.option(
    "--budget-ms",
    default=5.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Target: median milliseconds of one query on one thread.",
)
@click.option(
    "--recall",
    default=0.98,
    show_default=True,
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="Target: share of the true ten nearest that are found; the search is tuned to it.",
)
@click.option(
    "--memory-gb", default=8.0, show_default=True, type=click.FloatRange(min=0, min_open=True),
    help="Target: gigabytes (1e9 bytes) of the index when loaded, beside the bundle's mapped embeddings.",
)  # fmt: skip
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where lists are trained; auto: on GPUs if faiss has any.",
)
@click.option(
    "--backend",
    type=click.Choice(["faiss", "milvus"]),
    default="faiss",
    show_default=True,
    help="milvus: load the bundle into a collection of the Milvus at --uri instead; --factory is then auto (HNSW32), "
    "Flat, HNSW<links> or IVF<lists>,Flat, and the targets do not count.",
)
@click.option("--uri", help="With --backend milvus: http://[USER:PASSWORD@]HOST:PORT, or a file PATH.db.")
@click.option("--compact", is_flag=True, help="Write a new bundle instead: this one with its live changes folded in.")
@click.option("--live-dir", type=_BUNDLE, help="With --compact: the folder that holds the live changes.")
@click.option("--out", type=_BUNDLE, help="With --compact: folder for the new bundle, which must not exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the index manifest as one JSON object.")
def index(
    bundle: Path,
    factory: str,
    budget_ms: float,
    recall: float,
    memory_gb: float,
    device: str,
    backend: str,
    uri: str | None,
    compact: bool,
    live_dir: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Rebuild the search index of a bundle: index/entity.faiss and index/manifest.json.

    With --compact the bundle stays as it is, and a new one holds it and the entities put and deleted while serving.
    """
    from dataclasses import asdict

    if (backend == "milvus") != (uri is not None):
        raise click.UsageError("give --backend milvus and --uri together")
    if uri is not None:
        if compact or live_dir is not None or out is not None:
            raise click.UsageError("--compact is for changes in LIVE_DIR, not in Milvus; leave out one of them")
        _load(bundle, uri, factory, as_json=as_json)
        return
    if compact or live_dir is not None or out is not None:
        if not compact or live_dir is None or out is None or factory != "auto":
            raise click.UsageError("give --compact, --live-dir and --out together, and no --factory")
        _compact(bundle, live_dir, out, as_json=as_json)
        return
    from index.autotune import Targets
    from index.build import build_index
    from index.bundle import open_embeddings, open_manifest

    # Not Bundle.open: a broken index must not stand in the way of its own repair.
    embeddings = open_embeddings(bundle, open_manifest(bundle))
    targets = Targets(budget_ms=budget_ms, recall=recall, memory_gb=memory_gb)
    manifest = build_index(bundle, embeddings, factory=factory, targets=targets, device=device, progress=True)
    if as_json:
        click.echo(json.dumps(asdict(manifest)))
    else:
        click.echo(
            f"indexed {manifest.count} embeddings of width {manifest.dim} as {manifest.factory}: "
            f"{manifest.bytes / 1e6:.1f} MB in {manifest.elapsed_s:.1f} s ({manifest.why})"
        )


def _load(path: Path, uri: str, factory: str, *, as_json: bool) -> None:
    from index.bundle import Bundle
    from index.milvus import collection_name, connect, load_bundle

    bundle = Bundle.open(path)
    count = load_bundle(connect(uri), bundle, factory, progress=True)
    told = {"collection": collection_name(bundle), "embeddings": count}
    click.echo(json.dumps(told) if as_json else f"collection {told['collection']} holds {count} embeddings")


def _compact(bundle: Path, live_dir: Path, out: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from index.compact import compact

    made = compact(bundle, live_dir, out, progress=True)
    if as_json:
        click.echo(json.dumps(asdict(made.index_manifest)))
    else:
        counts = made.manifest.counts
        click.echo(
            f"bundle {out} ({made.fingerprint}): {counts.entities} entities, {counts.embeddings} embeddings; "
            "serve it with the same live folder"
        )


@click.command()
@click.argument("bundle", type=_BUNDLE)
@click.option("--verify", is_flag=True, help="Hash every byte of every file, not only small ones.")
@click.option("--json", "as_json", is_flag=True, help="Print what the bundle holds as one JSON object.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Say what a bundle holds, and whether it is whole; exit 2 if it is not."""
    from index.report import describe, describe_lines

    report = describe(bundle, verify="full" if verify else "quick")
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        click.echo("\n".join(describe_lines(report)))


@click.group(no_args_is_help=False)
def bundle() -> None:
    """Bring a bundle to a folder or an S3-compatible store, and from there.

    URI is a folder, file://... or s3://BUCKET/PREFIX (extra `s3`; credentials and endpoint as AWS's tools take them:
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or a profile). `wikiclip serve --bundle URI` serves one.
    """


@bundle.command()
@click.argument("bundle", type=_BUNDLE)
@click.argument("uri")
@click.option("--verify", is_flag=True, help="Read every byte back from URI afterwards, and hash it.")
@click.option("--json", "as_json", is_flag=True, help="Print what was transferred as one JSON object.")
def push(bundle: Path, uri: str, verify: bool, as_json: bool) -> None:
    """Bring BUNDLE to URI, every file checked before; cut off, run it again: only what is missing is sent."""
    from index.transfer import push as push_bundle

    _tell_transfer(push_bundle(bundle, uri, verify=verify, progress=True), f"is at {uri}", as_json=as_json)


@bundle.command()
@click.argument("uri")
@click.argument("folder", type=_BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print what was transferred as one JSON object.")
def pull(uri: str, folder: Path, as_json: bool) -> None:
    """Bring the bundle at URI into FOLDER, every byte hashed; cut off, run it again: it goes on where it was."""
    from index.transfer import pull as pull_bundle

    _tell_transfer(pull_bundle(uri, folder, progress=True), f"is in {folder}", as_json=as_json)


def _tell_transfer(came: Transferred, where: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        click.echo(json.dumps(asdict(came)))
    else:
        click.echo(
            f"{came.bundle} {where}: {came.files} file(s) of {came.bytes / 1e6:.1f} MB transferred, "
            f"{came.kept_files} of {came.kept_bytes / 1e6:.1f} MB were there"
        )
