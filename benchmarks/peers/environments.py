"""An environment of its own for each peer, under `build/peers/`, made once from the registry."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"
VERSIONS = {"litserve": "0.2.19", "mosec": "0.9.8", "bentoml": "1.4.40"}
SHARED = ("numpy", "pillow", "onnxruntime", "faiss-cpu")  # the versions that run here, so that only the server differs
_ALSO = {"litserve": ("python-multipart",)}  # which it needs for forms and does not bring
_STAMP = "requirements.txt"
_INSTALL_TIMEOUT_S = 900


class NoEnvironment(Exception):
    """Why a peer cannot be run here; it stands in the result."""


def interpreter(peer: str, *, make: bool) -> Path:
    """The Python of a peer's environment, made if it is not there and `make` says so. Raises `NoEnvironment`."""
    wanted = "\n".join(
        (f"{peer}=={VERSIONS[peer]}", *(f"{name}=={version(name)}" for name in (*SHARED, *_ALSO.get(peer, ()))))
    )
    folder = FOLDER / peer
    stamp, python = folder / _STAMP, folder / "bin" / "python"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if not make:
        raise NoEnvironment("its environment is not there yet; a run without --smoke makes it")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted.splitlines()])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.startswith("ERROR")] or error.stderr.splitlines()
        raise NoEnvironment(f"it cannot be installed: {lines[-1] if lines else error}") from error
    except subprocess.TimeoutExpired as error:
        raise NoEnvironment(f"it was not installed within {_INSTALL_TIMEOUT_S} s") from error
