"""Commands `index` and `bundle`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from index.transfer import Transferred

_BUNDLE = click.Path(path_type=Path)
_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--bundle", type=_BUNDLE, required=True, help="Folder of the bundle whose index is rebuilt.")
@click.option(
    "--factory",
    default="auto",
    help="A faiss factory string, such as Flat, HNSW32 or IVF256,SQ8. auto measures exact search, codes in lists, "
    "codes alone and a graph, and takes the first that meets the three targets.",
)
@click.option("--budget-ms", default=5.0, type=_POSITIVE, help="Target: median milliseconds of a query on one thread.")
@click.option(
    "--recall",
    default=0.98,
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    help="Target: share of the true ten nearest embeddings that are found. The search is tuned to it.",
)
@click.option(
    "--memory-gb",
    default=8.0,
    type=_POSITIVE,
    help="Target: gigabytes (1e9 bytes) of the loaded index, without the bundle's memory-mapped embeddings.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where lists are trained. auto uses GPUs if faiss has any.",
)
@click.option(
    "--backend",
    type=click.Choice(["faiss", "milvus"]),
    default="faiss",
    help="milvus loads the bundle into a collection of the Milvus at --uri. --factory is then auto (HNSW32), Flat, "
    "HNSW<links> or IVF<lists>,Flat, and the targets are ignored.",
)
@click.option("--uri", help="With --backend milvus: http://[USER:PASSWORD@]HOST:PORT, or a file PATH.db.")
@click.option("--compact", is_flag=True, help="Write a new bundle that includes the live changes.")
@click.option("--live-dir", type=_BUNDLE, help="With --compact: the folder with the live changes.")
@click.option("--out", type=_BUNDLE, help="With --compact: folder for the new bundle, which must not exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the index manifest as one JSON object.")
def index(
    bundle: Path,
    factory: str,
    device: str,
    backend: str,
    uri: str | None,
    compact: bool,
    live_dir: Path | None,
    out: Path | None,
    as_json: bool,
    **targets: float,
) -> None:
    """Rebuild the search index of a bundle: index/entity.faiss and index/manifest.json.

    With --compact, the bundle stays as it is. A new one includes the entities that were put and deleted while serving.
    """
    if (backend == "milvus") != (uri is not None):
        raise click.UsageError("give --backend milvus and --uri together")
    compacting = compact or live_dir is not None or out is not None
    if uri is not None:
        if compacting:
            raise click.UsageError("--compact is for changes in LIVE_DIR, not in Milvus; leave out one of them")
        report, text = _load_into_milvus(bundle, uri, factory)
    elif compacting:
        if not compact or live_dir is None or out is None or factory != "auto":
            raise click.UsageError("give --compact, --live-dir and --out together, and no --factory")
        report, text = _compact(bundle, live_dir, out)
    else:
        report, text = _build(bundle, factory, device, targets)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else text)


def _build(path: Path, factory: str, device: str, targets: Mapping[str, float]) -> tuple[dict[str, Any], str]:
    from index.autotune import Targets
    from index.build import build_index
    from index.bundle import open_embeddings, open_manifest
    from index.embeddings import pooled

    manifest = open_manifest(path)  # Bundle.open would refuse a broken index
    embeddings = pooled(open_embeddings(path, manifest), manifest.pooling)
    built = build_index(path, embeddings, factory=factory, targets=Targets(**targets), device=device, progress=True)
    return built.model_dump(), (
        f"indexed {built.count} embeddings of width {built.dim} as {built.factory}: {built.bytes / 1e6:.1f} MB in "
        f"{built.elapsed_s:.1f} s ({built.why})"
    )


def _load_into_milvus(path: Path, uri: str, factory: str) -> tuple[dict[str, Any], str]:
    from index.bundle import Bundle
    from index.milvus import Collection, connect

    collection = Collection(connect(uri), Bundle.open(path))
    count = collection.load(factory, progress=True)
    report = {"collection": collection.name, "embeddings": count}
    return report, f"collection {collection.name} holds {count} embeddings"


def _compact(path: Path, live_dir: Path, out: Path) -> tuple[dict[str, Any], str]:
    from index.compact import compact

    compacted = compact(path, live_dir, out, progress=True)
    counts = compacted.manifest.counts
    return compacted.index_manifest.model_dump(), (
        f"bundle {out} ({compacted.fingerprint}): {counts.entities} entities, {counts.embeddings} embeddings; serve it "
        "with the same live folder"
    )


@click.group(no_args_is_help=False)
def bundle() -> None:
    """Copy a bundle to or from a folder or an S3-compatible store.

    URI is a folder, file://... or s3://BUCKET/PREFIX. S3 needs the extra `s3`, and credentials and endpoint as for
    AWS's tools: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, or a profile. `wikiclip serve --bundle URI`
    serves a bundle from there.
    """


@bundle.command()
@click.argument("bundle", type=_BUNDLE)
@click.argument("uri")
@click.option("--verify", is_flag=True, help="Read every byte back from URI afterwards, and hash it.")
@click.option("--json", "as_json", is_flag=True, help="Print what was transferred as one JSON object.")
def push(bundle: Path, uri: str, verify: bool, as_json: bool) -> None:
    """Copy BUNDLE to URI. Every file is checked first. If interrupted, run it again to send only what is missing."""
    from index.transfer import push as push_bundle

    _print_transfer(push_bundle(bundle, uri, verify=verify, progress=True), f"is at {uri}", as_json=as_json)


@bundle.command()
@click.argument("uri")
@click.argument("folder", type=_BUNDLE)
@click.option("--json", "as_json", is_flag=True, help="Print what was transferred as one JSON object.")
def pull(uri: str, folder: Path, as_json: bool) -> None:
    """Copy the bundle at URI to FOLDER. Every byte is hashed. If interrupted, run it again to continue."""
    from index.transfer import pull as pull_bundle

    _print_transfer(pull_bundle(uri, folder, progress=True), f"is in {folder}", as_json=as_json)


def _print_transfer(result: Transferred, where: str, *, as_json: bool) -> None:
    text = (
        f"{result.bundle} {where}: {result.files} file(s) of {result.bytes / 1e6:.1f} MB transferred, "
        f"{result.kept_files} of {result.kept_bytes / 1e6:.1f} MB were there"
    )
    click.echo(json.dumps(asdict(result), ensure_ascii=False) if as_json else text)
