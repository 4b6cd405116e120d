"""The commands `wikiclip evaluate` and `wikiclip bench`."""

from __future__ import annotations

from pathlib import Path

import click

from core.errors import UserError

BENCHMARKS = {
    "service": "benchmarks.service_latency",
    "index": "benchmarks.index_search",
}


@click.command()
@click.option("--bundle", required=True, type=click.Path(path_type=Path), help="The bundle to evaluate, a folder.")
@click.option(
    "--queries", required=True, multiple=True, type=click.Path(path_type=Path, dir_okay=False),
    help="Labelled queries, JSONL; may be given several times.",
)  # fmt: skip
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="Predictions to write, JSONL."
)
@click.option(
    "--image-root",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the images. [default: the query file's]",
)
@click.option(
    "--ovenid2impath",
    type=click.Path(path_type=Path, dir_okay=False),
    help="OVEN's table of image ids and paths. [default: beside the queries, or in the image root]",
)
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(min=1), help="Images held at once.")
@click.option(
    "--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]), help="Where to encode."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    bundle: Path,
    queries: tuple[Path, ...],
    out: Path,
    image_root: Path | None,
    ovenid2impath: Path | None,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure accuracy on labelled queries: recall@1, 5 and 10 by split; top-1 for seen and unseen, and their HM."""
    import json
    from dataclasses import asdict

    from benchmarks import evaluation
    from service.recognizer import Recognizer
    from service.settings import load_settings

    if not out.parent.is_dir():
        raise UserError(f"{out.parent} does not exist; make the folder first, or write elsewhere with --out")
    settings = load_settings(cache="off", device=device)
    with Recognizer.open(bundle, settings) as recognizer:
        result = evaluation.evaluate(
            recognizer, queries, out, image_root=image_root, ovenid2impath=ovenid2impath, batch_size=batch_size
        )
        bundle_label = recognizer.label
    click.echo(json.dumps({"bundle": bundle_label, **asdict(result)}) if as_json else evaluation.as_table(result))
    if result.rejected:
        click.echo(f"{result.rejected} record(s) rejected, see {out.with_name('rejected.jsonl')}", err=True)


@click.command()
@click.argument("name", type=click.Choice([*BENCHMARKS, "all"]))
@click.option(
    "--bundle",
    default="demo/bundle",
    show_default=True,
    type=click.Path(path_type=Path),
    help="The bundle to measure on.",
)
@click.option("--smoke", is_flag=True, help="The same path with less work: ends within 50 s on 2 cores.")
@click.option(
    "--results", default="benchmarks/results", show_default=True, type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the results, in a folder named by hardware, date and commit.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def bench(name: str, bundle: Path, smoke: bool, results: Path, as_json: bool) -> None:
    """Run one benchmark, or all."""
    import importlib
    import json

    from benchmarks.report import describe_run, write_results

    chosen = list(BENCHMARKS) if name == "all" else [name]
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "benchmarks": chosen})
    figures = {}
    for each in chosen:
        figures[each] = importlib.import_module(BENCHMARKS[each]).measure(bundle, smoke=smoke)
        if not as_json:
            click.echo(f"{each}: " + ", ".join(f"{key} {value}" for key, value in figures[each].items()))
    outcome = {**run, "figures": figures if name == "all" else figures[name]}
    path = write_results(results, name, outcome)
    click.echo(f"written to {path}", err=True)
    if as_json:
        click.echo(json.dumps(outcome))
