"""Two processes started by torchrun equal one process with the whole batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from model.cli import train as train_command
from model.distributed import Group


def train(
    dataset: Any, tiny_spec: str, text_spec: str, out: Path, *, processes: int, batch_size: int, more: tuple[str, ...]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the rows of the log and the weights."""
    values: dict[str, Any] = {
        "catalog": dataset.catalog,
        "pairs": dataset.pairs,
        "image-encoder": tiny_spec,
        "text-encoder": text_spec,
        "out": out,
        "cache-dir": out.parent / "cache",
        "epochs": 3,
        "batch-size": batch_size,
        "lr": 0.003,
        "width": 16,
        "heads": 2,
        "dropout": 0,
        "max-tokens": 16,
        "device": "cpu",
    }
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    flags += ["--no-half", "--json", *more]
    if processes == 1:
        assert CliRunner().invoke(train_command, flags).exit_code == 0
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, "-m", "wikiclip", "train", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1  # one process reports
    rows = [json.loads(line) for line in out.with_name(f"{out.name}.train.jsonl").read_text().splitlines()]
    return [row for row in rows if "mean_loss" in row], load_file(out / "adaptor.safetensors")


@pytest.mark.parametrize(
    ("count", "batch_size", "more"),
    [
        # With seven pairs, the last batch leaves one process without a row.
        pytest.param(7, 3, (), id="uneven"),
        # With eight pairs, each process has one of the clusters, to which donors are confined.
        pytest.param(8, 4, ("--hard-negatives", "both", "--cluster-size", "4", "--n-sync", "2"), id="hard negatives"),
    ],
)
def test_two_processes_train_like_one_with_twice_the_batch(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path, count: int, batch_size: int, more: tuple[str, ...]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = dataset.pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join(rows[:count]))
    more = (*more, "--pairs", str(pairs), "--image-root", str(dataset.folder))
    one, one_weights = train(
        dataset, tiny_spec, text_spec, tmp_path / "one", processes=1, batch_size=2 * batch_size, more=more
    )
    two, two_weights = train(
        dataset, tiny_spec, text_spec, tmp_path / "two", processes=2, batch_size=batch_size, more=more
    )
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["mean_loss"] == pytest.approx(theirs["mean_loss"], rel=1e-4)
        assert ours["logit_scale"] == pytest.approx(theirs["logit_scale"], rel=1e-5)
    for name, weights in one_weights.items():
        if not name.endswith("key.bias"):  # the softmax ignores it: its gradient is rounding error
            torch.testing.assert_close(two_weights[name], weights, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_cover_a_batch_without_overlap(count: int) -> None:
    shares = [list(range(count))[Group(rank=rank, size=3).share(count)] for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
