"""The commands `wikiclip evaluate` and `wikiclip bench`."""

from __future__ import annotations

from pathlib import Path

import click

from core.errors import UserError

BENCHMARKS = {
    "claim": "benchmarks.claim",
    "service": "benchmarks.service_latency",
    "index": "benchmarks.index_search",
    "train": "benchmarks.training",
    "live": "benchmarks.live_changes",
    "load": "benchmarks.load",
    "peers": "benchmarks.peers.runner",
    "overload": "benchmarks.overload",
    "faults": "benchmarks.faults",
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
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False),
    help="Write a report with plots and confusions as one HTML file.",
)  # fmt: skip
@click.option(
    "--catalog", type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The catalog, for the entities' images in the report.  [default: the bundle's thumbnails]",
)  # fmt: skip
@click.option(
    "--leave-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="SHARE",
    help="Leave this share of the entities out of the search: queries for them ask for unknowns.  [default: none]",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    bundle: Path,
    queries: tuple[Path, ...],
    out: Path,
    image_root: Path | None,
    ovenid2impath: Path | None,
    batch_size: int,
    device: str,
    report: Path | None,
    catalog: Path | None,
    leave_out: float | None,
    as_json: bool,
) -> None:
    """Measure accuracy on labelled queries: recall@1, 5 and 10 by split; top-1 for seen and unseen, and their HM.

    All with 95 % intervals. Queries for entities that the bundle does not hold are counted apart. With a calibrated
    bundle also how well those are told from the others, and how far confidences can be trusted.
    """
    import json
    from dataclasses import asdict

    from benchmarks import evaluation
    from benchmarks.accuracy_report import write_report
    from benchmarks.left_out import ReducedBundle
    from benchmarks.left_out import leave_out as reduced
    from index.bundle import Bundle
    from service.recognizer import Recognizer
    from service.settings import load_settings

    for option, path in (("--out", out), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path.parent} does not exist; make the folder first, or write elsewhere with {option}")
    settings = load_settings(cache="off", device=device)
    opened = Bundle.open(bundle)
    if leave_out is not None:
        opened = reduced(opened, leave_out)
    left_out = opened.left_out if isinstance(opened, ReducedBundle) else frozenset()
    with Recognizer(opened, settings) as recognizer:
        answered, rejected = evaluation.answer_queries(
            recognizer,
            queries,
            out,
            image_root=image_root,
            batch_size=batch_size,
            ovenid2impath=ovenid2impath,
            left_out=left_out,
        )
        result = evaluation.summarise(answered, rejected=rejected)
        if report is not None:
            write_report(report, recognizer, result, answered, catalog=catalog, left_out=len(left_out))
        bundle_label = recognizer.label
    figures = {"bundle": bundle_label, "left_out": len(left_out), **asdict(result)}
    click.echo(json.dumps(figures) if as_json else evaluation.as_table(result))
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
    from core.files import write_durably

    chosen = list(BENCHMARKS) if name == "all" else [name]
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "benchmarks": chosen})
    figures, pages = {}, {}
    for each in chosen:
        module = importlib.import_module(BENCHMARKS[each])
        figures[each] = module.measure(bundle, smoke=smoke)
        if hasattr(module, "report"):
            pages[each] = module.report(figures[each])
        if not as_json:
            click.echo(f"{each}: " + ", ".join(f"{key} {value}" for key, value in figures[each].items()))
    outcome = {**run, "figures": figures if name == "all" else figures[name]}
    path = write_results(results, name, outcome)
    for each, page in pages.items():
        write_durably(path.with_name(f"{each}.html"), page.encode())
    click.echo(f"written to {path}", err=True)
    if as_json:
        click.echo(json.dumps(outcome))
