"""docs/cli.md is what the commands say, and so every flag there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("columns", ["50", "200"])
def test_the_page_is_what_the_commands_say(columns: str) -> None:
    # In a process of its own: click keeps help options that another test, which calls a command alone, has made.
    command = [sys.executable, ".ci/cli_reference.py"]
    written = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": columns, "PYTHONPATH": str(ROOT)},
    )
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == written.stdout, "the commands changed: run `make cli-docs`"
