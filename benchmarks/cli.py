"""The command `wikiclip bench`."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

_MINUTES = click.Option(
    ["--minutes"], type=click.FloatRange(min=0, min_open=True), help="End by itself within about this time."
)
_DEVICE = click.Option(["--device"], type=click.Choice(["cpu", "cuda"]), help="Where the models run.  [default: cpu]")
_CLAIM = (
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
    _DEVICE,
)  # fmt: skip
_INDEX = (
    click.Option(["--vectors"], type=click.IntRange(min=1), help="The largest size.  [default: 100000]"),
    click.Option(["--dim"], type=click.IntRange(min=1), help="Width of the synthetic embeddings.  [default: 512]"),
    click.Option(
        ["--peers-up-to"], type=click.IntRange(min=0),
        help="The largest size with flat search, HNSW and usearch.  [default: 20000]",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its module, help text and own options, each an argument of its `measure`.

    In `wikiclip bench all` it gets `takes_s` seconds on two cores and `arguments`. In a smoke run, it gets `smoke_s`
    and `smoke_arguments`, or is left out without `smoke_s`.
    """

    module: str
    help: str
    options: Sequence[click.Option] = ()
    takes_s: float = 90.0
    smoke_s: float | None = None
    arguments: Sequence[str] = ()
    smoke_arguments: Sequence[str] = ("--smoke",)


BENCHMARKS = {  # in the order in which `wikiclip bench all` runs them
    "stages": Benchmark(
        "benchmarks.stages", "Decode, encode, search, end to end, and the cache.", takes_s=60, smoke_s=12
    ),
    "claim": Benchmark(
        "benchmarks.claim", "Retrieval against generation on this machine: how many times faster.", _CLAIM,
        takes_s=330, smoke_s=16, smoke_arguments=("--smoke", "--size", "tiny"),
    ),
    "load": Benchmark("benchmarks.load", "Latency against offered load, and the knee.", takes_s=130),
    "peers": Benchmark(
        "benchmarks.peers", "LitServe, mosec and BentoML with the same encoder and vectors.", takes_s=100,
        arguments=("--smoke",),
    ),
    "service": Benchmark(
        "benchmarks.service", "What HTTP adds to decode, encode and search.", takes_s=170, smoke_s=8
    ),
    "index": Benchmark("benchmarks.index", "Search time for one query and many, and by size.", _INDEX),
    "export": Benchmark("benchmarks.export", "An export against its models alone.", [_DEVICE], takes_s=60),
    "overload": Benchmark(
        "benchmarks.overload", "Ten times the peak load: goodput, refusals, memory, recovery.", takes_s=240
    ),
    "faults": Benchmark(
        "benchmarks.faults",
        "Under load: Redis and the engine killed, bundles swapped, clients that leave, hostile bodies.", takes_s=420,
    ),
    "train": Benchmark("benchmarks.training", "What the feature cache saves in training."),
    "live": Benchmark("benchmarks.live", "Live changes checked against a dict, with kills and restarts."),
}  # fmt: skip
_COMMON = [
    click.Option(
        ["--bundle"], default=Path("demo/bundle"), type=click.Path(path_type=Path),
        help="The bundle to measure on.",
    ),
    click.Option(["--smoke"], is_flag=True, help="The same path with less work: ends within 50 s on 2 cores."),
    click.Option(
        ["--results"], default=Path("benchmarks/results"),
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder for the results, in a folder named by hardware, date and commit.",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object last."),
]  # fmt: skip


@click.group()
def bench() -> None:
    """Run one benchmark or all, or compare two runs."""
    # As an exception, so that the processes which a benchmark has started are stopped.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _run(name: str, /, bundle: Path, smoke: bool, results: Path, as_json: bool, **options: Any) -> None:
    import importlib
    import json

    from benchmarks.measure import MACHINE, write_outcome
    from core.runtime import describe_run

    module = importlib.import_module(BENCHMARKS[name].module)
    options = {option: value for option, value in options.items() if value is not None}
    run = describe_run({"bundle": bundle.name, "smoke": smoke, "benchmarks": [name], **options})
    figures = module.measure(bundle, smoke=smoke, **options)
    outcome = {**run, "figures": figures}
    report = getattr(module, "REPORT", None)
    parts = {"machine": (MACHINE, run), name: (report, figures)} if report else {}
    write_outcome(results, name, outcome, name.capitalize(), parts)
    if as_json:
        click.echo(json.dumps(outcome))
    elif hasattr(module, "as_table"):
        click.echo(module.as_table(figures))
    else:
        click.echo("\n".join(f"{key}: {json.dumps(value)}" for key, value in _without_samples(figures).items()))


def _run_all(bundle: Path, smoke: bool, results: Path, as_json: bool, minutes: float | None) -> None:
    import json

    from benchmarks.suite import run_all

    outcome = run_all(BENCHMARKS, bundle, results, smoke=smoke, minutes=minutes)
    if as_json:
        click.echo(json.dumps(outcome))


for _name, _benchmark in BENCHMARKS.items():
    bench.add_command(
        click.Command(
            _name, params=[*_COMMON, *_benchmark.options], help=_benchmark.help, callback=partial(_run, _name)
        )
    )
bench.add_command(
    click.Command(
        "all", params=[*_COMMON, _MINUTES], callback=_run_all,
        help="All that the time allows, as one JSON file and one HTML report.",
    )
)  # fmt: skip


def _without_samples(figures: Any) -> Any:
    if not isinstance(figures, dict):
        return figures
    return {k: _without_samples(v) for k, v in figures.items() if k not in ("samples", "reference_ms")}


@bench.command()
@click.argument("before", metavar="A", type=click.Path(path_type=Path))
@click.argument("after", metavar="B", type=click.Path(path_type=Path))
@click.option(
    "--threshold", default=20.0, type=click.FloatRange(min=0, min_open=True), metavar="PERCENT",
    help="A metric that is worse by more, beyond noise, is a regression.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last.")
def compare(before: Path, after: Path, threshold: float, as_json: bool) -> None:
    """Report what changed from A to B beyond noise. The exit code is 1 on a regression past the threshold.

    A and B are JSON files of `wikiclip bench`, or folders of them. docs/benchmarks.md describes the test.
    """
    import json
    from dataclasses import asdict

    from benchmarks.compare import as_text, read_run, regressions
    from benchmarks.compare import compare as compare_runs

    changes = compare_runs(read_run(before), read_run(after), threshold=threshold / 100)
    worse = regressions(changes)
    click.echo(as_text(changes, threshold / 100))
    if as_json:
        shown = [asdict(change) for change in changes]
        click.echo(json.dumps({"regressions": worse, "changes": shown, "threshold": threshold / 100}))
    if worse:
        sys.exit(1)
