"""Push and pull a bundle of many small files, each of which the store makes wait.

python -m benchmarks.transfer [FILES] [LATENCY_MS]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from index.bundle import Bundle, list_files
from index.manifest import MANIFEST_FILE, Manifest
from index.transfer import Remote, Transferred, pull, push

DEMO_BUNDLE = Path(__file__).resolve().parents[1] / "demo" / "bundle"
FILE_BYTES = 4096


def write_bundle(folder: Path, files: int) -> None:
    """Write a copy of the demo's bundle with `files` small files more."""
    shutil.copytree(DEMO_BUNDLE, folder)
    (folder / "parts").mkdir()
    for number in range(files):
        (folder / "parts" / f"{number:05}").write_bytes(number.to_bytes(8, "little") * (FILE_BYTES // 8))
    manifest = Manifest.read(folder / MANIFEST_FILE)
    manifest.model_copy(update={"files": list_files(folder)}).write(folder / MANIFEST_FILE)


def delayed(method: Callable[..., Any], latency_ms: float) -> Callable[..., Any]:
    @wraps(method)
    def slow(*arguments: Any) -> Any:
        time.sleep(latency_ms / 1000)
        return method(*arguments)

    return slow


def report(action: str, move: Callable[[], Transferred]) -> None:
    started_at = time.monotonic()
    moved = move()
    click.echo(f"{action}: {time.monotonic() - started_at:.1f} s for {moved.files} files")


def main(files: int = 3000, latency_ms: int = 20) -> None:
    for name in ("put", "chunks"):
        setattr(Remote, name, delayed(getattr(Remote, name), latency_ms))
    with tempfile.TemporaryDirectory() as name:
        bundle, store, pulled = (Path(name) / each for each in ("bundle", "store", "pulled"))
        write_bundle(bundle, files)
        report("push", lambda: push(bundle, str(store), progress=True))
        report("pull", lambda: pull(str(store), pulled, progress=True))
        assert Bundle.open(pulled, verify="full").unlisted_files() == []


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
