"""The command `wikiclip bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

BENCHMARKS = {
    "claim": "benchmarks.claim",
    "service": "benchmarks.service",
    "index": "benchmarks.index",
    "train": "benchmarks.training",
    "live": "benchmarks.live",
    "load": "benchmarks.load",
    "peers": "benchmarks.peers.runner",
    "stages": "benchmarks.stages",
    "overload": "benchmarks.overload",
    "faults": "benchmarks.faults",
    "export": "benchmarks.export",
}
# What `--help` says of each.
TOLD = {
    "all": "All that time allows, as one JSON file and one HTML report.",
    "claim": "Retrieval against generation, both on this machine: how many times faster.",
    "service": "What HTTP adds to decode, encode and search.",
    "index": "How long a search takes, one query and many.",
    "train": "What the feature cache saves in training.",
    "live": "Live changes against a dict, killed again and again.",
    "load": "Latency against offered load, and the knee.",
    "peers": "LitServe, mosec and BentoML serving the same encoder, beside this service.",
    "overload": "Ten times the load that it can answer: goodput, refusals, memory, recovery.",
    "faults": "Under load: Redis and the engine killed, bundles swapped, clients that leave, hostile bodies.",
    "export": "An export against its models alone; int8 against float32.",
    "stages": "Decode, encode, search, end to end, the cache, and growth with the catalog.",
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
# What single benchmarks take beside that; each is an argument of its `measure`.
OPTIONS: dict[str, Sequence[click.Option]] = {
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
        click.Option(["--threads"], type=click.IntRange(min=1), help="Of both systems.  [default: one a core]"),
        click.Option(["--device"], type=click.Choice(["cpu", "cuda"]), help="Where both run.  [default: cpu]"),
    ],
    "export": [
        click.Option(["--device"], type=click.Choice(["cpu", "cuda"]), help="Where the models run.  [default: cpu]"),
        click.Option(
            ["--folder"], type=click.Path(path_type=Path, file_okay=False),
            help="Keep what is exported there, for the next run.  [default: made anew]",
        ),
    ],
}  # fmt: skip


class _Benchmarks(click.Group):
    """`wikiclip bench NAME`: a command for each benchmark, made when it is named; none is imported before it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*BENCHMARKS, "all", "compare"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in BENCHMARKS and cmd_name != "all":
            return super().get_command(ctx, cmd_name)
        told = TOLD.get(cmd_name)
        options: list[click.Parameter] = [*_COMMON, *OPTIONS.get(cmd_name, ())]
        return click.Command(cmd_name, params=options, help=told, callback=partial(_run, cmd_name))


@click.group(cls=_Benchmarks)
def bench() -> None:
    """Measure: one benchmark, all, or what changed between two runs."""


def _run(name: str, /, bundle: Path, smoke: bool, results: Path, as_json: bool, **given: Any) -> None:
    import importlib
    import json

    from benchmarks.measure import write_results
    from core.files import atomic_write_bytes
    from core.runtime import describe_run

    given = {option: value for option, value in given.items() if value is not None}
    if name == "all":
        from benchmarks.suite import run_all

        path, outcome = run_all(BENCHMARKS, bundle, results, smoke=smoke, minutes=given.get("minutes"))
    else:
        module = importlib.import_module(BENCHMARKS[name])
        run = describe_run({"bundle": bundle.name, "smoke": smoke, "benchmarks": [name], **given})
        figures = module.measure(bundle, smoke=smoke, **given)
        outcome = {**run, "figures": figures}
        path = write_results(results, name, outcome)
        for kind in ("html", "csv"):
            if make := getattr(module, {"html": "report", "csv": "as_csv"}[kind], None):
                atomic_write_bytes(path.with_suffix(f".{kind}"), make(figures).encode())
        if not as_json:
            click.echo("\n".join(f"{key}: {json.dumps(value)}" for key, value in _without_samples(figures).items()))
    click.echo(f"written to {path}", err=True)
    if as_json:
        click.echo(json.dumps(outcome))


def _without_samples(figures: Any) -> Any:
    """For a terminal: figures, without the single samples that they are of."""
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
    """Say what changed from A to B beyond noise; exit code 1 on a regression past the threshold.

    A and B are JSON files of `wikiclip bench`, or folders of them. Runs keep every sample, and a reference that was
    timed beside each: docs/benchmarks.md says how two of them are told apart.
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
