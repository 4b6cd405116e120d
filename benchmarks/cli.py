"""The command `wikiclip bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

# Module and help text of each.
BENCHMARKS = {
    "claim": ("benchmarks.claim", "Retrieval against generation on this machine: how many times faster."),
    "service": ("benchmarks.service", "What HTTP adds to decode, encode and search."),
    "index": ("benchmarks.index", "Search time for one query and many."),
    "train": ("benchmarks.training", "What the feature cache saves in training."),
    "live": ("benchmarks.live", "Live changes checked against a dict, with kills and restarts."),
    "load": ("benchmarks.load", "Latency against offered load, and the knee."),
    "peers": ("benchmarks.peers", "LitServe, mosec and BentoML with the same encoder and vectors."),
    "stages": ("benchmarks.stages", "Decode, encode, search, end to end, the cache, and growth with the catalog."),
    "overload": ("benchmarks.overload", "Ten times the peak load: goodput, refusals, memory, recovery."),
    "faults": (
        "benchmarks.faults",
        "Under load: Redis and the engine killed, bundles swapped, clients that leave, hostile bodies.",
    ),
    "export": ("benchmarks.export", "An export against its models alone; int8 against float32."),
}
_COMMON = [
    click.Option(
        ["--bundle"], default=Path("demo/bundle"), show_default=True, type=click.Path(path_type=Path),
        help="The bundle to measure on.",
    ),
    click.Option(["--smoke"], is_flag=True, help="The same path with less work: ends within 50 s on 2 cores."),
    click.Option(
        ["--results"], default=Path("benchmarks/results"), show_default=True,
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder for the results, in a folder named by hardware, date and commit.",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object last."),
]  # fmt: skip
_MINUTES = click.Option(
    ["--minutes"], type=click.FloatRange(min=0, min_open=True), help="End by itself within about this time."
)
# Further options by benchmark. Each is an argument of its `measure`.
_OPTIONS: dict[str, Sequence[click.Option]] = {
    "all": [_MINUTES],
    "stages": [_MINUTES],
    "claim": [
        _MINUTES,
        click.Option(
            ["--size"], type=click.Choice(["tiny", "135M", "0.5B", "7B", "13B"]),
            help="Parameters of the baseline.  [default: 0.5B; 7B on a GPU]",
        ),
        click.Option(
            ["--encoder"], type=click.Choice(["vit-b32", "vit-l14", "eva-clip-8b"]),
            help="The image encoder of retrieval, by its shape.  [default: vit-b32; vit-l14 on a GPU]",
        ),
        click.Option(["--entities"], type=click.IntRange(min=1), help="Size of the catalog.  [default: 100000]"),
        click.Option(["--repeats"], type=click.IntRange(min=2), help="Images.  [default: 12]"),
        click.Option(["--threads"], type=click.IntRange(min=1), help="Of both systems.  [default: one per core]"),
        click.Option(["--device"], type=click.Choice(["cpu", "cuda"]), help="Where both run.  [default: cpu]"),
    ],
    "export": [
        click.Option(["--device"], type=click.Choice(["cpu", "cuda"]), help="Where the models run.  [default: cpu]"),
        click.Option(
            ["--folder"], type=click.Path(path_type=Path, file_okay=False),
            help="Keep catalog and checkpoint there for the next run.  [default: a temporary folder]",
        ),
    ],
}  # fmt: skip


class _Benchmarks(click.Group):
    """A command for each benchmark. Its module is imported when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*BENCHMARKS, "all", "compare"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in BENCHMARKS:
            callback: Callable[..., None] = partial(_run, cmd_name)
            help_text = BENCHMARKS[cmd_name][1]
        elif cmd_name == "all":
            callback, help_text = _run_all, "All that the time allows, as one JSON file and one HTML report."
        else:
            return super().get_command(ctx, cmd_name)
        options: list[click.Parameter] = [*_COMMON, *_OPTIONS.get(cmd_name, ())]
        return click.Command(cmd_name, params=options, help=help_text, callback=callback)


@click.group(cls=_Benchmarks)
def bench() -> None:
    """Run one benchmark or all, or compare two runs."""


def _run(name: str, /, bundle: Path, smoke: bool, results: Path, as_json: bool, **options: Any) -> None:
    import importlib
    import json

    from benchmarks.measure import write_report, write_results
    from core.files import atomic_write_bytes
    from core.runtime import describe_run
    from evaluation.pages import figures_page

    module = importlib.import_module(BENCHMARKS[name][0])
    options = {option: value for option, value in options.items() if value is not None}
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "benchmarks": [name], **options})
    figures = module.measure(bundle, smoke=smoke, **options)
    outcome = {**run, "figures": figures}
    path = write_results(results, name, outcome)
    if hasattr(module, "REPORT"):
        write_report(path, lambda: figures_page(module.REPORT.title, {name: (module.REPORT, figures)}))
    elif hasattr(module, "report"):
        write_report(path, lambda: module.report(figures))
    if hasattr(module, "as_csv"):
        atomic_write_bytes(path.with_suffix(".csv"), module.as_csv(figures).encode())
    if not as_json:
        click.echo("\n".join(f"{key}: {json.dumps(value)}" for key, value in _without_samples(figures).items()))
    _finish(path, outcome, as_json)


def _run_all(bundle: Path, smoke: bool, results: Path, as_json: bool, minutes: float | None) -> None:
    from benchmarks.suite import run_all

    path, outcome = run_all(BENCHMARKS, bundle, results, smoke=smoke, minutes=minutes)
    _finish(path, outcome, as_json)


def _finish(path: Path, outcome: dict[str, Any], as_json: bool) -> None:
    import json

    click.echo(f"written to {path}", err=True)
    if as_json:
        click.echo(json.dumps(outcome))


def _without_samples(figures: Any) -> Any:
    if not isinstance(figures, dict):
        return figures
    return {k: _without_samples(v) for k, v in figures.items() if k not in ("samples", "reference_ms")}


@bench.command()
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--threshold", default=20.0, show_default=True, type=click.FloatRange(min=0, min_open=True), metavar="PERCENT",
    help="A metric that is worse by more, beyond noise, is a regression.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def compare(before: Path, after: Path, threshold: float, as_json: bool) -> None:
    """Report what changed from A to B beyond noise. The exit code is 1 on a regression past the threshold.

    A and B are JSON files of `wikiclip bench`, or folders of them. docs/benchmarks.md describes the test.
    """
    import json

    from benchmarks.compare import as_text, read_run
    from benchmarks.compare import compare as compare_runs

    comparison = compare_runs(read_run(before), read_run(after), threshold=threshold / 100)
    click.echo(as_text(comparison))
    if as_json:
        regressions = [change.name for change in comparison.regressions]
        changes = [change.as_dict() for change in comparison.changes]
        click.echo(json.dumps({"regressions": regressions, "changes": changes, "threshold": threshold / 100}))
    if comparison.regressions:
        sys.exit(1)
