"""`python -m benchmarks.catalog_scale --records 1000000`: export a large synthetic catalog, killed and undisturbed.

One export runs undisturbed. A second is killed (SIGKILL) after random numbers of shards, and resumed. Every file of the
two bundles must be equal, except for times. The encoders are tiny, so that the cost of everything else
shows. Memory is the proportional set size of the process and its workers. Linux only.
"""

from __future__ import annotations

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from benchmarks.export import make_checkpoint, write_catalog, write_encoders
from benchmarks.generative.models import EncoderShape
from benchmarks.measure import write_outcome
from core.runtime import describe_run
from index.bundle import Bundle

KILLS = 3
_SHARD, _SAMPLE_EVERY_S = 4096, 0.5
_IMAGE = EncoderShape(width=32, layers=1, heads=2, patch_px=16, embedding_dim=32, size_px=32)
_TEXT = {
    "vocab_size": 32_000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def measure(records: int, folder: Path) -> dict[str, Any]:
    """Write catalog and checkpoint to `folder`, export twice, and compare."""
    catalog = write_catalog(folder / "catalog", records, words=20, size_px=48, image_every=3)
    encoders = write_encoders(folder, _IMAGE, _TEXT)
    checkpoint = make_checkpoint(folder / "checkpoint", *encoders, width=32)
    command = [
        sys.executable, "-m", "wikiclip", "export", "--resume", "--catalog", str(catalog), "--name", "made",
        "--image-encoder", encoders[0], "--text-encoder", encoders[1], "--checkpoint", str(checkpoint),
        "--shard-size", str(_SHARD), "--batch-size", "128", "--workers", "1",
    ]  # fmt: skip
    started = time.monotonic()
    peaks_mb = {"undisturbed": _export(command, folder / "undisturbed")}
    seconds = time.monotonic() - started
    shards = -(-records // _SHARD)
    rng = random.Random(records)
    kill_at = sorted(rng.sample(range(shards), min(KILLS, shards)))
    peaks_mb["killed"] = max(_export(command, folder / "killed", kill_at=each) for each in [*kill_at, math.inf])
    undisturbed, killed = (Bundle.open(folder / name, "full") for name in peaks_mb)
    return {
        "records": records,
        "seconds": round(seconds, 1),
        "entities_per_s": round(records / seconds, 1),
        "peak_mb": peaks_mb,
        "killed_after_shards": kill_at,
        "files": len(killed.manifest.files),
        "checksums_equal": undisturbed.fingerprint == killed.fingerprint,
    }


def _export(command: list[str], out: Path, *, kill_at: float = math.inf) -> float:
    """Run an export to its end, or kill it once `kill_at` shards are finished. Return its peak memory in MB."""
    peak_mb = 0.0
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            if len(list((out / ".partial" / "shards").glob("0*.json"))) >= kill_at:
                child.kill()
            peak_mb = max(peak_mb, _memory_mb(child.pid))
            with suppress(subprocess.TimeoutExpired):
                child.wait(_SAMPLE_EVERY_S)
    if child.returncode != (0 if kill_at == math.inf else -signal.SIGKILL):
        raise click.ClickException(f"the export ended with exit code {child.returncode}")
    return round(peak_mb, 1)


def _memory_mb(pid: int) -> float:
    """Return the proportional set size of a process and its descendants, without those that ended."""
    try:
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = " ".join(task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    own_kb = sum(map(int, re.findall(r"^Pss:\s+(\d+)", memory, flags=re.MULTILINE)))
    return own_kb / 1e3 + sum(_memory_mb(int(child)) for child in children)


@click.command(context_settings={"show_default": True})
@click.option("--records", type=click.IntRange(min=1), default=100_000, help="Entities to export.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder to work in.  [default: a temporary one]")
@click.option("--results", default="benchmarks/results", type=click.Path(path_type=Path))
def main(records: int, work: Path | None, results: Path) -> None:
    """Export a synthetic catalog twice, once killed three times, and compare."""
    run = describe_run({"records": records})
    with TemporaryDirectory(prefix="scale.", dir=work) as folder:
        figures = measure(records, Path(folder))
    write_outcome(results, f"export-{records}", {**run, "figures": figures}, "", {})
    click.echo(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
