"""`wikiclip` in the process of the tests: a new process would import torch or the service again for each command."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from wikiclip.cli import main


def run_wikiclip(*arguments: str | Path | float) -> CompletedProcess[str]:
    """Run a command and return its exit code and what it printed.

    The C library's memory settings, which some commands change, stay as they are: other tests measure memory.
    """
    given = ["wikiclip", *map(str, arguments)]
    code: str | int | None = 0
    with (
        redirect_stdout(io.StringIO()) as stdout,
        redirect_stderr(io.StringIO()) as stderr,
        patch.object(sys, "argv", given),
        patch("core.runtime.keep_freed_memory"),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return CompletedProcess(given, code, stdout.getvalue(), stderr.getvalue())
