"""`python -m benchmarks.catalog_scale --records 1000000`: an export of a made catalog, its memory, and three kills.

One export runs undisturbed, a second is killed (SIGKILL) three times at random moments and resumed; every file of the
two bundles must be equal but for times. The encoders are tiny, so that everything besides them shows. Memory is that of
the process and its workers (Linux's proportional set size): `anonymous` is what they hold, `total` has mapped files,
too, which the system may take back at any time.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.export_models import make_checkpoint, write_catalog, write_small_encoders
from benchmarks.measure import write_results
from core.files import atomic_write_bytes, sha256_file
from core.runtime import describe_run
from evaluation.pages import Series, line_plot, page, section, table

KILLS = 3
_SHARD, _LOOK_EVERY_S = 4096, 1.0
_TIMES = ("created_at", "elapsed_s")


@dataclass(kw_only=True)
class Run:
    """One or more processes after each other that make a bundle; `curve` has seconds, total and anonymous MB."""

    out: Path
    seconds: float = 0.0
    kills: int = 0
    curve: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def peak_mb(self) -> dict[str, float]:
        return {
            "total": round(max(total for _, total, _ in self.curve), 1),
            "anonymous": round(max(anonymous for _, _, anonymous in self.curve), 1),
        }


def measure(records: int, folder: Path) -> dict[str, Any]:
    """Make catalog and checkpoint in `folder`, export twice, compare. Linux only."""
    catalog = write_catalog(folder, records, words=20, size_px=48, image_every=3)
    image_encoder, text_encoder = write_small_encoders(folder)
    checkpoint = make_checkpoint(folder / "checkpoint", image_encoder, text_encoder, width=32)
    command = [sys.executable, "-m", "wikiclip", "export", "--resume", "--catalog", str(catalog), "--name", "made"]
    command += ["--image-encoder", image_encoder, "--text-encoder", text_encoder]
    command += ["--checkpoint", str(checkpoint), "--shard-size", str(_SHARD), "--batch-size", "128", "--workers", "1"]
    undisturbed, disturbed = Run(out=folder / "undisturbed"), Run(out=folder / "disturbed")
    _run(command, undisturbed)
    shards = -(-records // _SHARD)
    drawn = random.Random(records)
    moments = sorted(drawn.sample(range(shards), min(KILLS, shards)))
    for moment in moments:
        _run(command, disturbed, kill_at=moment, kill_after_s=drawn.uniform(0, 2))
    _run(command, disturbed)
    sums = [_checksums(run.out) for run in (undisturbed, disturbed)]
    return {
        "records": records,
        "seconds": round(undisturbed.seconds, 1),
        "entities_per_s": round(records / undisturbed.seconds, 1),
        "peak_mb": undisturbed.peak_mb,
        "kills": disturbed.kills,
        "killed_after_shards": moments,
        "seconds_killed_and_resumed": round(disturbed.seconds, 1),
        "peak_mb_killed_and_resumed": disturbed.peak_mb,
        "files": len(sums[0]),
        "checksums_equal": sums[0] == sums[1],
        "bundle_mb": round(sum(file.stat().st_size for file in _files(undisturbed.out)) / 1e6, 1),
        "curves": {name: run.curve for name, run in (("undisturbed", undisturbed), ("killed", disturbed))},
    }


def _run(command: list[str], run: Run, *, kill_at: int | None = None, kill_after_s: float = 0.0) -> None:
    """Run an export to its end, or kill it so long after as many shards were finished."""
    started, before = time.monotonic(), run.seconds
    shards = run.out / ".partial" / "shards"
    killed_at_s: float | None = None
    with subprocess.Popen(
        [*command, "--out", str(run.out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        next_look = started
        while child.poll() is None:
            if kill_at is not None and killed_at_s is None and len(list(shards.glob("0*.jsonl"))) >= kill_at:
                killed_at_s = time.monotonic() + kill_after_s
            if killed_at_s is not None and time.monotonic() >= killed_at_s:
                child.kill()
            if time.monotonic() >= next_look:
                total_mb, anonymous_mb = _memory_mb(child.pid)
                run.curve.append((round(before + time.monotonic() - started, 1), total_mb, anonymous_mb))
                next_look += _LOOK_EVERY_S
            time.sleep(0.05)
        assert child.stderr is not None, "it is a pipe"
        errors = child.stderr.read()
    run.kills += child.returncode == -signal.SIGKILL
    if kill_at is None and child.returncode:
        raise click.ClickException(errors.decode(errors="replace").splitlines()[-1])
    run.seconds = before + time.monotonic() - started


def _memory_mb(pid: int) -> tuple[float, float]:
    """Total and anonymous proportional set size of a process and all below it, in MB; 0 of what has just ended."""
    total = anonymous = 0.0
    for process in (pid, *_children(pid)):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        sizes = {line.partition(":")[0]: int(line.split()[1]) / 1e3 for line in lines[1:]}
        total += sizes.get("Pss", 0.0)
        anonymous += sizes.get("Pss_Anon", 0.0) + sizes.get("Pss_Shmem", 0.0)
    return round(total, 1), round(anonymous, 1)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in map(int, path.read_text().split()):
                found += [child, *_children(child)]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _files(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def _checksums(bundle: Path) -> dict[str, Any]:
    """The SHA-256 of each file; of a manifest its content without times."""
    sums: dict[str, Any] = {}
    for path in _files(bundle):
        name = path.relative_to(bundle).as_posix()
        if name.endswith("manifest.json"):
            sums[name] = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in _TIMES}
        else:
            sums[name] = sha256_file(path)
    return sums


def report(figures: dict[str, Any]) -> str:
    """The memory curves as an HTML page."""
    series = [
        Series(name=f"{name}, {kind}", points=[(point[0], point[column]) for point in curve])
        for name, curve in figures["curves"].items()
        for column, kind in ((1, "total"), (2, "anonymous"))
    ]
    plot = line_plot(series, title="Memory", x_label="seconds of work", y_label="MB")
    rows = [[key, str(value)] for key, value in figures.items() if key != "curves"]
    return page("An export of a made catalog", section("Memory", plot) + table(("", ""), rows))


@click.command()
@click.option("--records", type=click.IntRange(min=1), default=100_000, show_default=True, help="Entities to make.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in.  [default: a temporary one]"
)
@click.option("--results", default="benchmarks/results", show_default=True, type=click.Path(path_type=Path))
def main(records: int, work: Path | None, results: Path) -> None:
    """Export a made catalog twice, once killed three times, and compare."""
    run = describe_run({"records": records})
    with TemporaryDirectory(prefix="scale.", dir=work) as folder:
        figures = measure(records, Path(folder))
    path = write_results(results, f"export-{records}", {**run, "figures": figures})
    atomic_write_bytes(path.with_suffix(".html"), report(figures).encode())
    click.echo(json.dumps({key: value for key, value in figures.items() if key != "curves"}, indent=1))
    click.echo(f"written to {path}", err=True)


if __name__ == "__main__":
    main()
