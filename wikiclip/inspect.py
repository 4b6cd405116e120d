"""Command `inspect`: what a bundle contains, or whether an ONNX file can be an image encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("path", metavar="BUNDLE_OR_ONNX", type=click.Path(path_type=Path))
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
