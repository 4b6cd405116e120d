"""`python -m benchmarks.catalog_scale --records 1000000`: export a large synthetic catalog, killed and undisturbed.

One export runs undisturbed. A second is killed (SIGKILL) three times at random moments and resumed. Every file of the
two bundles must be equal, except for times. The encoders are tiny, so that the cost of everything else shows. Memory is
the proportional set size of the process and its workers: `anonymous` is their own, `total` includes mapped files, which
the system may reclaim at any time. Linux only.
"""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from benchmarks.export import make_checkpoint, write_catalog, write_tokenizer
from benchmarks.measure import write_outcome
from core.files import sha256_file
from core.runtime import describe_run
from evaluation.pages import Lines, Report
from imaging import Preprocessing
from model.encoders.tiny import TinyConfig, TinyEncoder, save_tiny

KILLS = 3
_SHARD, _SAMPLE_EVERY_S = 4096, 0.5
_TIMES = ("created_at", "elapsed_s")
Point = dict[str, float]  # the memory at a second

REPORT = Report(
    title="An export of a synthetic catalog",
    plots=(
        Lines(
            title="Memory", points=("curves/*/*",), x="second", y=("total_mb", "anonymous_mb"),
            x_label="seconds of work", y_label="MB",
        ),
    ),
)  # fmt: skip


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
    undisturbed, killed = folder / "undisturbed", folder / "disturbed"
    curves: dict[str, list[Point]] = {"undisturbed": [], "killed": []}
    _export(command, undisturbed, curves["undisturbed"])
    shards = -(-records // _SHARD)
    rng = random.Random(records)
    kill_at = sorted(rng.sample(range(shards), min(KILLS, shards)))
    kills = 0
    for finished_shards in kill_at:
        kills += _export(command, killed, curves["killed"], kill_at=finished_shards, kill_after_s=rng.uniform(0, 2))
    _export(command, killed, curves["killed"])
    checksums = [_checksums(out) for out in (undisturbed, killed)]
    seconds = curves["undisturbed"][-1]["second"]
    return {
        "records": records,
        "seconds": seconds,
        "entities_per_s": round(records / seconds, 1),
        "peak_mb": {
            name: {kind: max(point[kind] for point in curve) for kind in ("total_mb", "anonymous_mb")}
            for name, curve in curves.items()
        },
        "kills": kills,
        "killed_after_shards": kill_at,
        "files": len(checksums[0]),
        "checksums_equal": checksums[0] == checksums[1],
        "curves": curves,
    }


def _export(
    command: list[str], out: Path, curve: list[Point], *, kill_at: int | None = None, kill_after_s: float = 0.0
) -> bool:
    """Run an export to its end, or kill it `kill_after_s` seconds after `kill_at` shards are finished.

    Add its memory over time to `curve`, after the seconds there. Return whether it was killed.
    """
    before_s = curve[-1]["second"] if curve else 0.0
    started = time.monotonic()
    kill_time = math.inf
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            finished_shards = len(list((out / ".partial" / "shards").glob("0*.jsonl")))
            if kill_at is not None and kill_time == math.inf and finished_shards >= kill_at:
                kill_time = time.monotonic() + kill_after_s
            if time.monotonic() >= kill_time:
                child.kill()
            second = round(before_s + time.monotonic() - started, 1)
            total_mb, anonymous_mb = _memory_mb(child.pid)
            curve.append({"second": second, "total_mb": total_mb, "anonymous_mb": anonymous_mb})
            with suppress(subprocess.TimeoutExpired):
                child.wait(_SAMPLE_EVERY_S)
    if kill_at is None and child.returncode:
        raise click.ClickException(f"the export ended with exit code {child.returncode}")
    return child.returncode == -signal.SIGKILL


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


def _checksums(bundle: Path) -> dict[str, Any]:
    """Return the SHA-256 of each file, and the content of manifests without times."""
    sums: dict[str, Any] = {}
    for path in bundle.rglob("*"):
        if path.name == "manifest.json":
            content = json.loads(path.read_bytes())
            sums[str(path.relative_to(bundle))] = {key: content[key] for key in content if key not in _TIMES}
        elif path.is_file():
            sums[str(path.relative_to(bundle))] = sha256_file(path)
    return sums


@click.command(context_settings={"show_default": True})
@click.option("--records", type=click.IntRange(min=1), default=100_000, help="Entities to export.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder to work in.  [default: a temporary one]")
@click.option("--results", default="benchmarks/results", type=click.Path(path_type=Path))
def main(records: int, work: Path | None, results: Path) -> None:
    """Export a synthetic catalog twice, once killed three times, and compare."""
    run = describe_run({"records": records})
    with TemporaryDirectory(prefix="scale.", dir=work) as folder:
        figures = measure(records, Path(folder))
    outcome = {**run, "figures": figures}
    write_outcome(results, f"export-{records}", outcome, REPORT.title, {"export": (REPORT, figures)})
    click.echo(json.dumps({key: value for key, value in figures.items() if key != "curves"}, indent=1))


if __name__ == "__main__":
    main()
