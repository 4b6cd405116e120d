from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from model.train import open_log


class Recorder:
    """What TensorBoard's writer would be asked for."""

    asked: list[Any]

    def __init__(self, folder: str, purge_step: int) -> None:
        Recorder.asked = [(Path(folder).name, purge_step)]

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        Recorder.asked.append((tag, scalar_value, global_step))

    def close(self) -> None:
        Recorder.asked.append("closed")


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Recorder


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_has_one_log_without_what_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "x.train.jsonl"
    with open_log(path, tmp_path / "x.tensorboard", after_step=0) as log:
        for step in (10, 20, 30):
            log({"step": step, "loss": 1.0})
            log({"step": step, "mean_loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 4')  # cut off
    with open_log(path, tmp_path / "x.tensorboard", after_step=20) as log:
        log({"step": 20, "mean_loss": 0.5})
        log({"step": 30, "loss": 0.5})
    assert steps(path) == [10, 10, 20, 20, 30]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.5
    with open_log(path, tmp_path / "x.tensorboard", after_step=0) as log:
        log({"step": 1})
    assert steps(path) == [1]


def test_tensorboard_gets_the_figures_where_it_is_installed(tensorboard: type[Recorder], tmp_path: Path) -> None:
    with open_log(tmp_path / "x.train.jsonl", tmp_path / "x.tensorboard", after_step=7) as log:
        log({"step": 10, "loss": 0.5, "validation": {"hm": 0.25, "unseen": None}})
    assert tensorboard.asked == [("x.tensorboard", 8), ("loss", 0.5, 10), ("validation/hm", 0.25, 10), "closed"]
