"""The notebook runs from first cell to last and is committed without output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "recognise.ipynb"


def test_it_runs(tmp_path: Path) -> None:
    # A process of its own: kernels come with warnings and threads that are none of this project's.
    script = Path(sys.executable).with_name("jupyter-execute")
    command = [script, NOTEBOOK, "--output", tmp_path / "run.ipynb", "--timeout", "300"]
    # Folders of its own, too: a kernel that the user has installed would be taken before this environment's.
    folders = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    environment = {**os.environ, **{name: str(tmp_path / name.lower()) for name in folders}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    run = json.loads((tmp_path / "run.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in run["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    printed = "".join(
        "".join(output["text"]) for cell in code for output in cell["outputs"] if output["output_type"] == "stream"
    )
    assert "1. Flag of Sweden" in printed
    assert "Flag of Japan" in printed
    assert "abstained: True" in printed


def test_it_has_no_output() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
