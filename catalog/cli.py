"""Command `catalog`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=0)


def _codes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(code.strip() for code in (value or "").split(",") if code.strip())


def _items(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    words = [word.strip() for word in value.split(",") if word.strip()]
    if bad := [word for word in words if not re.fullmatch(r"Q[1-9]\d*", word)]:
        raise click.BadParameter(f"{bad[0]} is not a Wikidata item; give ids such as Q729,Q756")
    return tuple(int(word[1:]) for word in words)


def _set_aside(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    matches = {value: re.fullmatch(r"([\w-]+)=([1-9]\d*)", value) for value in values}
    if bad := [value for value, match in matches.items() if match is None]:
        raise click.BadParameter(f"{bad[0]!r} is not NAME=N, such as test=1")
    return {match[1]: int(match[2]) for match in matches.values() if match is not None}


@click.command(context_settings={"show_default": True})
@click.option("--folder", type=_PATH, help="Folder of pictures, in a folder for each entity.  [default: none]")
@click.option("--table", type=_PATH, help="With --folder: CSV file that describes the pictures.  [default: none]")
@click.option(
    "--set-aside", metavar="NAME=N", multiple=True, callback=_set_aside,
    help="With --folder: write the last N pictures of each entity to NAME.jsonl, as labelled queries, and not to the "
    "catalog. Repeatable.  [default: none]",
)  # fmt: skip
@click.option("--content", type=_PATH, multiple=True, help="CirrusSearch dump: file or folder. Repeatable.")
@click.option(
    "--page-props", type=_PATH, multiple=True, help="The wiki's page_props.sql.gz. Repeatable.  [default: none]"
)
@click.option("--wikidata", type=_PATH, help="Wikidata's all.json.gz or .bz2: types, titles, images.  [default: none]")
@click.option("--base", type=_PATH, help="Earlier catalog to bring up to date.  [default: none]")
@click.option("--out", type=_PATH, required=True, help="The catalog: .jsonl, .jsonl.gz or .parquet.")
@click.option("--resume", is_flag=True, help="Finish an interrupted build, or begin one.")
@click.option("--language", metavar="CODE", help="Only articles in this language.  [default: any]")
@click.option("--titles", metavar="CODES", callback=_codes, help="Languages of further titles: de,fr.  [default: none]")
@click.option(
    "--types", metavar="ITEMS", callback=_items, default="", show_default=False,
    help="Only items of these types or their subclasses, such as Q16521,Q811979.  [default: all]",
)  # fmt: skip
@click.option(
    "--without-types", metavar="ITEMS", callback=_items,
    help="Exclude these types and their subclasses.  [default: disambiguation pages, lists, categories, templates]",
)  # fmt: skip
@click.option("--min-links", type=_COUNT, default=0, help="Minimum incoming links of an article.")
@click.option("--max-text", type=_COUNT, default=4000, help="Characters per article.")
@click.option(
    "--image-width", "image_width_px", type=click.Choice([0, 250, 330, 500, 960, 1280]), default=500,
    help="Width of images in pixels, one of Wikimedia's standard sizes. 0: as uploaded.",
)  # fmt: skip
@click.option("--free-images", is_flag=True, help="Only page images with a free licence.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.pass_context
def catalog(
    context: click.Context,
    /,
    folder: Path | None,
    table: Path | None,
    set_aside: Mapping[str, int],
    as_json: bool,
    **options: Any,
) -> None:
    """Build a catalog from a folder of pictures (--folder) or from Wikimedia's public dumps (--content).

    In a folder of pictures, each folder is an entity of its name, and text.txt or text.md in it is its text. The
    columns of a table are image (a path in the folder), title, text, types, entity_id, description, url and symbol.

    From dumps, --base brings an earlier catalog up to date, and --resume finishes an interrupted build with the same
    result as an uninterrupted one.
    """
    if (folder is None) == (not options["content"]):
        raise click.UsageError("give one of --folder and --content")
    if folder is not None:
        _only(context, {"folder", "table", "set_aside", "out", "as_json"}, "--content")
        _catalog_of_folder(folder, table, set_aside, options["out"], as_json)
    else:
        _only(context, {*options, "as_json"}, "--folder")
        _catalog_of_dumps(as_json, options)


def _only(context: click.Context, names: set[str], other: str) -> None:
    """Raise `UsageError` if an option is given that is none of `names`."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name not in names and context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"{parameter.opts[0]} goes with {other}; leave it out")


def _catalog_of_folder(
    folder: Path, table: Path | None, set_aside: Mapping[str, int], out: Path, as_json: bool
) -> None:
    from catalog.folder import FolderConfig, build_folder_catalog, report, report_lines

    config = FolderConfig(folder=folder, table=table, out=out, set_aside=set_aside, progress=True)
    found = build_folder_catalog(config)
    click.echo(json.dumps(report(found, config)) if as_json else "\n".join(report_lines(found, config)))


def _catalog_of_dumps(as_json: bool, options: dict[str, Any]) -> None:
    from catalog.build import CatalogConfig, build_catalog

    if options["without_types"] is None:
        del options["without_types"]
    report = build_catalog(CatalogConfig(**options, progress=True))
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    click.echo(
        f"catalog {options['out']}: {report.entities} entities of {report.documents} documents, "
        f"{report.with_image} with an image, {report.with_text} with text; {report.elapsed_s:.1f} s"
    )
    if report.against_base is not None:
        click.echo(
            "compared with the base: " + ", ".join(f"{count} {name}" for name, count in report.against_base.items())
        )
    for reason, count in report.left_out.items():
        click.echo(f"left out: {count} {reason}")
    if report.rejected:
        click.echo(f"{report.rejected} record(s) rejected, see {options['out'].with_name(report.rejects)}")
