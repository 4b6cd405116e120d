"""The figures of a run as they come: JSON lines, and TensorBoard's event files where it is installed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from core.files import atomic_write_bytes


class _Writer(Protocol):
    """What is used of `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


class TrainLog:
    """Writes rows that have a `step` and figures, which may be nested once."""

    def __init__(self, path: Path, writer: _Writer | None) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _flat(row):
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


@contextmanager
def open_log(path: Path, tensorboard: Path, *, after_step: int) -> Iterator[TrainLog]:
    """A log in the file `path` and, where TensorBoard is installed, in the folder `tensorboard`.

    Rows of a former run stay up to the snapshot at `after_step`, so that a resumed run has one log; 0 starts anew. An
    epoch's own row follows the snapshot of its last step, and so is written again.
    """
    kept = []
    if after_step and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the line that was being written when the run was cut off
                break
            if row["step"] > after_step or (row["step"] == after_step and "mean_loss" in row):
                break
            kept.append(line + "\n")
    atomic_write_bytes(path, "".join(kept).encode())
    log = TrainLog(path, _tensorboard_writer(tensorboard, after_step))
    try:
        yield log
    finally:
        log.close()


def _tensorboard_writer(folder: Path, after_step: int) -> _Writer | None:
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    writer: _Writer = module.SummaryWriter(str(folder), purge_step=after_step + 1)
    return writer


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", figure) for inner, figure in value.items())
        else:
            yield name, value
