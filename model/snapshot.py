"""A training run as it stands between two steps, on disk, so that one that was cut off can go on."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from core.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """The one snapshot of a run, in the file `path`, replaced every `every_steps` steps; 0 for never.

    `run` is a fingerprint of everything that the result depends on: only a run with the same one may go on from it.
    """

    path: Path
    every_steps: int
    run: str

    def due(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0

    def save(self, values: Mapping[str, Any]) -> None:
        """Plain values and tensors; whenever the process dies, the file is the old snapshot or the new one."""
        with atomic_write(self.path) as temporary:
            torch.save({"run": self.run, **values}, temporary)

    def load(self) -> dict[str, Any] | None:
        """Its values, on CPU; None where there is none. Raises `CheckpointError` if it is broken or another run's."""
        if not self.path.exists():
            return None
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self.path} cannot be read: {reason}; train from the start, without --resume"
            ) from error
        if not isinstance(values, dict) or values.get("run") != self.run:
            raise CheckpointError(
                f"{self.path} is of a run with other settings, encoders, pairs or number of processes; give the same "
                "ones, or train from the start, without --resume"
            )
        return values

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def fingerprint(settings: Mapping[str, Any], rows: Iterable[bytes]) -> str:
    """The SHA-256, in hexadecimal, of plain settings and of rows of data, in order."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for row in rows:
        digest.update(len(row).to_bytes(8, "big") + row)
    return digest.hexdigest()
