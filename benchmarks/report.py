"""What a benchmark ran on, and where its results go."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from core.files import atomic_write_bytes
from core.runtime import usable_cores

BEFORE = ".before.json"


def describe_run(settings: dict[str, Any]) -> dict[str, Any]:
    """`hardware`, `commit`, `date` and `settings`: what a figure means nothing without."""
    return {
        "hardware": _hardware(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "settings": settings,
    }


def write_results(folder: Path, name: str, outcome: dict[str, Any]) -> Path:
    """Write `FOLDER/<hardware>-<date>-<commit>/NAME.json` and return its path.

    A run that was there already is kept as `NAME.before.json`: two runs of one commit can be compared.
    """
    path = results_folder(folder, outcome) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.replace(path.with_name(f"{name}{BEFORE}"))
    atomic_write_bytes(path, json.dumps(outcome, indent=1).encode())
    return path


def results_folder(folder: Path, run: dict[str, Any]) -> Path:
    """Where the results of this hardware, date and commit go."""
    label = f"{run['hardware']['name']}-{run['date']}-{run['commit']}"
    return folder / re.sub(r"[^A-Za-z0-9.-]+", "_", label)


def _hardware() -> dict[str, Any]:
    cores = usable_cores()
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return {"name": f"{model} {cores} cores", "cpu": model, "cores": cores, "python": platform.python_version()}


def _commit() -> str:
    """The short commit, `-dirty` where the tree differs from it, `unknown` outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")
