"""Commands `up`, which runs catalog, export and serve, and `inspect`, which describes a bundle or an ONNX file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_THUMBNAIL_PX = 256


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=_PATH)
@click.option("--table", type=_PATH, help="CSV file that describes the pictures.  [default: names of folders]")
@click.option("--image-encoder", metavar="SPEC", default="photo", help="The image encoder.")
@click.option(
    "--out", type=_PATH, help="Folder for the bundle.  [default: FOLDER's name and `-bundle`, in the current folder]"
)
@click.option("--port", type=click.IntRange(0, 65535), help="TCP port of the service.  [default: as for `serve`: 8000]")
@click.option("--no-serve", is_flag=True, help="Write the bundle, and do not serve it.")
def up(
    folder: Path, table: Path | None, image_encoder: str, out: Path | None, port: int | None, no_serve: bool
) -> None:
    """Go from a folder of pictures to a service with a page, in one command and without training.

    In FOLDER, each folder is an entity of its name, and text.txt or text.md in it is its text. Or a table describes the
    pictures (`wikiclip catalog --help` names its columns). What cannot be used is listed in rejected.jsonl next to the
    bundle, as is the catalog (BUNDLE.catalog.jsonl). Run the same command again to continue or to serve the bundle.
    """
    out = out or Path(f"{folder.resolve().name}-bundle")
    address = None if no_serve else _free_address(out, port)

    from catalog.folder import FolderConfig, check_folder, read_folder, report_lines
    from core.errors import UserError
    from core.files import atomic_write_bytes
    from core.lines import to_jsonl
    from index.manifest import MANIFEST_FILE

    check_folder(folder)
    if not (out / MANIFEST_FILE).exists():
        from model.encoders import open_image_encoder

        open_image_encoder(image_encoder)  # fails before the long work
    shown = sys.stderr.isatty()
    catalog = FolderConfig(folder=folder, table=table, out=out.with_name(f"{out.name}.catalog.jsonl"), progress=shown)
    found = read_folder(catalog, ours=[out])
    rows = to_jsonl(found.rows)
    if out.is_dir() and any(out.iterdir()) and catalog.out.exists() and catalog.out.read_bytes() != rows:
        raise UserError(
            f"{out} was made from other pictures or texts than {folder} has now; choose another --out, or remove {out}"
        )
    atomic_write_bytes(catalog.out, rows)
    click.echo("\n".join(report_lines(found, catalog)))
    lines = _finished_lines(out, catalog.out, image_encoder)
    if lines is None:
        from core.runtime import keep_freed_memory
        from export.cli import summary_lines
        from export.config import ExportConfig
        from export.pipeline import export_bundle

        keep_freed_memory()
        config = ExportConfig(
            catalog=catalog.out,
            out=out,
            image_encoder=image_encoder,
            rejected=tuple(found.rejected),
            thumbnail_px=_THUMBNAIL_PX,
            store_text=True,
            resume=True,
            progress=shown,
        )
        lines = list(summary_lines(export_bundle(config), config))
    click.echo("\n".join(lines))
    if address is None:
        return
    from service.server import url_of

    click.echo(f"page: {url_of(*address)} (Ctrl-C stops the service)")
    sys.stdout.flush()
    # A new program in this process: the service needs no torch. With -P, folders here do not shadow packages.
    serve = ["serve", "--bundle", str(out), "--port", str(address[1])]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "wikiclip", *serve])


def _finished_lines(out: Path, catalog: Path, image_encoder: str) -> list[str] | None:
    """Describe the bundle if it was made from this catalog and encoder. Otherwise, return None. No torch is loaded.

    A bundle does not record the folder of an encoder file, so export has to compare such an encoder itself.
    """
    from core.files import sha256_file
    from index.bundle import Bundle
    from index.manifest import MANIFEST_FILE
    from index.report import self_check_lines

    if not (out / MANIFEST_FILE).exists():
        return None
    bundle = Bundle.open(out)
    manifest = bundle.manifest
    if (manifest.export.get("catalog_sha256"), manifest.model.get("image_encoder")) != (
        sha256_file(catalog),
        image_encoder,
    ):
        return None
    check = manifest.self_check
    return [f"bundle {out} ({bundle.fingerprint}) is complete", *(self_check_lines(check) if check else ())]


def _free_address(bundle: Path, port: int | None) -> tuple[str, int]:
    """Return the host and port that the service will have. Raises `UserError` if the port is taken."""
    from service.server import bind
    from service.settings import load_settings

    settings = load_settings(bundle=bundle, **({} if port is None else {"port": port}))
    with bind(settings.host, settings.port) as listener:
        host, free_port = listener.getsockname()[:2]
    return host, free_port


@click.command()
@click.argument("path", metavar="BUNDLE_OR_ONNX", type=_PATH)
@click.option("--verify", is_flag=True, help="Hash every byte of every file of a bundle, not only of small ones.")
@click.option("--json", "as_json", is_flag=True, help="Print the description as one JSON object.")
def inspect(path: Path, verify: bool, as_json: bool) -> None:
    """Describe a bundle and check that it is complete and unaltered. Exit with 2 if it is not.

    Of an ONNX file (NAME.onnx), say whether it can be an image encoder (onnx:NAME.onnx), and all that is wrong with it.
    """
    if path.suffix == ".onnx":
        report = _describe_onnx(path)
        lines = _onnx_lines(path, report)
    else:
        from index.report import describe, describe_lines

        report = describe(path, verify="full" if verify else "quick")
        lines = describe_lines(report)
    click.echo(json.dumps(report, ensure_ascii=False) if as_json else "\n".join(lines))
    if report.get("problems"):
        raise click.exceptions.Exit(2)


def _describe_onnx(path: Path) -> dict[str, Any]:
    from model.encoders.onnx import check_onnx

    check = check_onnx(path)
    return {
        "problems": check.problems,
        "preprocessing": check.preprocessing.to_dict() if check.preprocessing else None,
        "embedding_dim": check.embedding_dim,
        "patches": check.patches,
        "patch_dim": check.patch_dim,
    }


def _onnx_lines(path: Path, report: dict[str, Any]) -> list[str]:
    if report["problems"]:
        return [f"{path} cannot be an image encoder:", *(f"- {problem}" for problem in report["problems"])]
    sizes = "images of {preprocessing[size_px]} px, embeddings of width {embedding_dim}, {patches} patch tokens"
    without = "" if report["patches"] else ": no heat maps, and no training"
    return [f"{path} can be an image encoder: onnx:{path}", sizes.format_map(report) + without]
