"""`python -m benchmarks.catalog_scale --records 1000000`: export a large synthetic catalog, killed and undisturbed.

One export runs undisturbed. A second is killed (SIGKILL) three times at random moments and resumed. Every file of the
two bundles must be equal, except for times. The encoders are tiny, so that the cost of everything else shows. Memory is
the proportional set size of the process and its workers: `anonymous` is their own, `total` includes mapped files, which
the system may reclaim at any time. Linux only.
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
import torch

from benchmarks.export import make_checkpoint, write_catalog, write_tokenizer
from benchmarks.measure import write_report, write_results
from core.files import sha256_file
from core.runtime import describe_run
from evaluation.pages import Series, figures_table, line_plot, page, section
from imaging import Preprocessing
from model.encoders.tiny import TinyConfig, TinyEncoder, save_tiny

KILLS = 3
_SHARD, _SAMPLE_EVERY_S = 4096, 1.0
_TIMES = ("created_at", "elapsed_s")


@dataclass(kw_only=True)
class Run:
    """An export in one or more processes. `curve` has (seconds, total MB, anonymous MB)."""

    out: Path
    seconds: float = 0.0
    kills: int = 0
    curve: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def peak_mb(self) -> dict[str, float]:
        return {kind: max(point[column] for point in self.curve) for column, kind in ((1, "total"), (2, "anonymous"))}


def write_small_encoders(folder: Path) -> tuple[str, str]:
    """Write encoders that cost next to nothing. Return their specs."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=32, size_px=32)
    grey = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(
        size_px=32, resize="squash", crop="none", interpolation="bilinear", mean=grey, std=grey
    )
    save_tiny(TinyEncoder(config).eval(), preprocessing, folder / "small.safetensors")
    text = BertConfig(
        vocab_size=write_tokenizer(folder / "text"), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    BertModel(text).save_pretrained(folder / "text")
    return f"tiny:{folder / 'small.safetensors'}", f"hf:{folder / 'text'}"


def measure(records: int, folder: Path) -> dict[str, Any]:
    """Write catalog and checkpoint to `folder`, export twice, and compare."""
    catalog = write_catalog(folder, records, words=20, size_px=48, image_every=3)
    image_encoder, text_encoder = write_small_encoders(folder)
    checkpoint = make_checkpoint(folder / "checkpoint", image_encoder, text_encoder, width=32)
    command = [
        sys.executable, "-m", "wikiclip", "export", "--resume", "--catalog", str(catalog), "--name", "made",
        "--image-encoder", image_encoder, "--text-encoder", text_encoder, "--checkpoint", str(checkpoint),
        "--shard-size", str(_SHARD), "--batch-size", "128", "--workers", "1",
    ]  # fmt: skip
    undisturbed, killed = Run(out=folder / "undisturbed"), Run(out=folder / "disturbed")
    _run(command, undisturbed)
    shards = -(-records // _SHARD)
    rng = random.Random(records)
    kill_at = sorted(rng.sample(range(shards), min(KILLS, shards)))
    for finished_shards in kill_at:
        _run(command, killed, kill_at=finished_shards, kill_after_s=rng.uniform(0, 2))
    _run(command, killed)
    checksums = [_checksums(run.out) for run in (undisturbed, killed)]
    return {
        "records": records,
        "seconds": round(undisturbed.seconds, 1),
        "entities_per_s": round(records / undisturbed.seconds, 1),
        "peak_mb": undisturbed.peak_mb,
        "kills": killed.kills,
        "killed_after_shards": kill_at,
        "seconds_killed_and_resumed": round(killed.seconds, 1),
        "peak_mb_killed_and_resumed": killed.peak_mb,
        "files": len(checksums[0]),
        "checksums_equal": checksums[0] == checksums[1],
        "bundle_mb": round(sum(file.stat().st_size for file in _files(undisturbed.out)) / 1e6, 1),
        "curves": {"undisturbed": undisturbed.curve, "killed": killed.curve},
    }


def _run(command: list[str], run: Run, *, kill_at: int | None = None, kill_after_s: float = 0.0) -> None:
    """Run an export to its end, or kill it `kill_after_s` seconds after `kill_at` shards are finished."""
    started, previous_s = time.monotonic(), run.seconds
    shards = run.out / ".partial" / "shards"
    kill_time: float | None = None
    with subprocess.Popen(
        [*command, "--out", str(run.out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as child:
        next_sample = started
        while child.poll() is None:
            if kill_at is not None and kill_time is None and len(list(shards.glob("0*.jsonl"))) >= kill_at:
                kill_time = time.monotonic() + kill_after_s
            if kill_time is not None and time.monotonic() >= kill_time:
                child.kill()
            if time.monotonic() >= next_sample:
                run.curve.append((round(previous_s + time.monotonic() - started, 1), *_memory_mb(child.pid)))
                next_sample += _SAMPLE_EVERY_S
            time.sleep(0.05)
        assert child.stderr is not None, "it is a pipe"
        errors = child.stderr.read()
    run.kills += child.returncode == -signal.SIGKILL
    if kill_at is None and child.returncode:
        raise click.ClickException(errors.decode(errors="replace").splitlines()[-1])
    run.seconds = previous_s + time.monotonic() - started


def _memory_mb(pid: int) -> tuple[float, float]:
    """Return total and anonymous proportional set size of a process and its descendants, without those that ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    sizes = {line.partition(":")[0]: int(line.split()[1]) / 1e3 for line in lines}
    total, anonymous = sizes.get("Pss", 0.0), sizes.get("Pss_Anon", 0.0) + sizes.get("Pss_Shmem", 0.0)
    for child in " ".join(tasks).split():
        child_total, child_anonymous = _memory_mb(int(child))
        total, anonymous = total + child_total, anonymous + child_anonymous
    return round(total, 1), round(anonymous, 1)


def _files(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def _checksums(bundle: Path) -> dict[str, Any]:
    """Return the SHA-256 of each file, and the content of manifests without times."""
    sums: dict[str, Any] = {}
    for path in _files(bundle):
        name = path.relative_to(bundle).as_posix()
        if name.endswith("manifest.json"):
            sums[name] = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in _TIMES}
        else:
            sums[name] = sha256_file(path)
    return sums


def report(figures: dict[str, Any]) -> str:
    """Return the figures and memory curves as an HTML page."""
    series = [
        Series(name=f"{name}, {kind}", points=[(point[0], point[column]) for point in curve])
        for name, curve in figures["curves"].items()
        for column, kind in ((1, "total"), (2, "anonymous"))
    ]
    plot = line_plot(series, title="Memory", x_label="seconds of work", y_label="MB")
    others = {key: value for key, value in figures.items() if key != "curves"}
    return page("An export of a synthetic catalog", section("Memory", plot) + figures_table(others))


@click.command()
@click.option("--records", type=click.IntRange(min=1), default=100_000, show_default=True, help="Entities to export.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), help="Folder to work in.  [default: a temporary one]"
)
@click.option("--results", default="benchmarks/results", show_default=True, type=click.Path(path_type=Path))
def main(records: int, work: Path | None, results: Path) -> None:
    """Export a synthetic catalog twice, once killed three times, and compare."""
    run = describe_run({"records": records})
    with TemporaryDirectory(prefix="scale.", dir=work) as folder:
        figures = measure(records, Path(folder))
    path = write_results(results, f"export-{records}", {**run, "figures": figures})
    write_report(path, lambda: report(figures))
    click.echo(json.dumps({key: value for key, value in figures.items() if key != "curves"}, indent=1))
    click.echo(f"written to {path}", err=True)


if __name__ == "__main__":
    main()
