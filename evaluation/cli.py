"""The command `wikiclip evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from core.errors import UserError

_FILE, _FOLDER = click.Path(path_type=Path, dir_okay=False), click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="The bundle to evaluate, a folder.")
@click.option(
    "--queries",
    "query_files",
    required=True,
    multiple=True,
    type=_FILE,
    help="Labelled queries, JSONL, or a service's feedback; may be given several times.",
)
@click.option("--out", required=True, type=_FILE, help="Predictions to write, JSONL.")
@click.option("--image-root", type=_FOLDER, help="Folder of the images. [default: that of the query file]")
@click.option(
    "--ovenid2impath", type=_FILE,
    help="OVEN's table of image ids and paths. [default: in the folder of the queries, or in the image root]",
)  # fmt: skip
@click.option("--batch-size", default=256, type=click.IntRange(min=1), help="Images per batch.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to encode.")
@click.option("--report", type=_FILE, help="Write a report with plots and confusions as one HTML file.")
@click.option(
    "--catalog", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The catalog. Its local images are encoded to compare the bundle of a checkpoint with its encoder without "
    "training, which takes as long as an export of them, and shown in the report instead of the bundle's thumbnails.",
)  # fmt: skip
@click.option(
    "--leave-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
    help="Leave this share of the entities out of the search; queries for them are unknown.  [default: none]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    bundle: Path,
    out: Path,
    device: str,
    report: Path | None,
    catalog: Path | None,
    leave_out: float | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure accuracy on labelled queries: recall@1, 5 and 10 by split; top-1 for seen and unseen, and their HM.

    All figures have 95 % intervals. Queries for entities that the bundle lacks are counted separately. With a
    calibrated bundle, also measure the calibration of confidences, the detection of such unknown entities, and how many
    queries have a certain level and how often it is right.
    """
    import json
    from dataclasses import asdict

    from evaluation.evaluate import HoldoutBundle, answer_queries, hold_out
    from evaluation.metrics import as_table, compare, format_ratios, summarise
    from evaluation.pages import require_libraries, write_report
    from evaluation.untrained import answer_untrained
    from index.bundle import Bundle
    from service.recognizer import Recognizer
    from service.settings import load_settings

    for option, path in (("--out", out), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path.parent} does not exist; create the folder or choose another path for {option}")
    if report is not None:
        require_libraries()
    opened = Bundle.open(bundle)
    if leave_out is not None:
        opened = hold_out(opened, leave_out)
    held_out = opened.held_out if isinstance(opened, HoldoutBundle) else frozenset[int]()
    with Recognizer(opened, load_settings(cache="off", device=device)) as recognizer:
        answered, rejected = answer_queries(recognizer, predictions_path=out, held_out=held_out, **reading)
        result = summarise(answered, rejected=rejected)
        figures = {"bundle": recognizer.label, "left_out": len(held_out), **asdict(result)}
        table, comparison = as_table(result), ""
        if opened.manifest.images_only:
            pass  # it is not trained
        elif catalog is None:
            click.echo("give --catalog to compare with the encoder without training", err=True)
        elif (others := answer_untrained(recognizer, answered, catalog, held_out=held_out)) is None:
            click.echo(
                f"no comparison with the encoder without training: no local image of {catalog} is usable", err=True
            )
        else:
            untrained, ratios = summarise(others, rejected=rejected), compare(answered, others)
            figures["untrained"] = {**asdict(untrained), "ratios": ratios}
            comparison = f"right answers, as a multiple of those without training: {format_ratios(ratios)}"
            table += f"\n\nwithout training, by the image encoder alone\n{as_table(untrained)}\n\n{comparison}"
        if report is not None:
            write_report(
                report, recognizer, result, answered, catalog=catalog, held_out=len(held_out), comparison=comparison
            )
    click.echo(json.dumps(figures) if as_json else table)
    if result.rejected:
        click.echo(f"{result.rejected} record(s) rejected, see {out.with_name('rejected.jsonl')}", err=True)
