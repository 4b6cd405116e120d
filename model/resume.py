"""Snapshots and results of runs on disk, from which an interrupted run or experiment resumes."""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError, first_line
from core.files import atomic_write, atomic_write_bytes
from core.lines import to_jsonl
from model.features import EntityKeys, KeyedPair


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """The snapshot of a run in the file `path`, replaced every `every_steps` steps (0: never).

    `run` is a fingerprint of everything that the result depends on. Only a run with the same one can resume from it.
    """

    path: Path
    every_steps: int
    run: str

    def due(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(self, values: Mapping[str, Any]) -> None:
        """Replace the snapshot atomically by plain values and tensors."""
        with atomic_write(self.path) as temporary:
            torch.save({"run": self.run, **values}, temporary)

    def load(self) -> dict[str, Any] | None:
        """Return the snapshot's values on the CPU, or None if there is none.

        Raises `CheckpointError` if it is damaged or of another run.
        """
        if not self.path.exists():
            return None
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {first_line(error)}; delete it to start over"
            ) from error
        if not isinstance(values, dict) or values.get("run") != self.run:
            raise CheckpointError(
                f"{self.path} is of a run with other settings, encoders, data or number of processes; use the same "
                "ones, or delete it to start over"
            )
        return values

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class FinishedRuns:
    """The results of an experiment's finished runs by their fingerprints, one per line of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        self._rows: dict[str, dict[str, Any]] = {row["run"]: row for row in rows}

    def __contains__(self, run: str) -> bool:
        return run in self._rows

    def __getitem__(self, run: str) -> dict[str, Any]:
        return self._rows[run]

    def add(self, run: str, result: Mapping[str, Any]) -> None:
        """Add a result, on disk too."""
        self._rows[run] = {"run": run, **result}
        atomic_write_bytes(self._path, to_jsonl(self._rows.values()))


def fingerprint(settings: Mapping[str, Any], *data: Iterable[EntityKeys | KeyedPair]) -> str:
    """Return the SHA-256, in hexadecimal, of plain settings and of the data of a run."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for rows in data:
        digest.update(b"\n")
        for row in rows:
            digest.update(repr(row).encode())
    return digest.hexdigest()
