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

from benchmarks.generator import free_port
from model.cli import train
from model.distributed import Group

# Torch's launcher starts this once for both runs: starting its processes takes most of the time. Each run has its own
# store, because the launcher's holds the addresses of the first.
TRAIN = """
import json, os, sys
from wikiclip.cli import main
for port, flags in json.loads(sys.argv[1]):
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    sys.argv = ["wikiclip", "train", *flags]
    main()
"""
# Pairs, rows of each process in a batch, more flags.
RUNS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    # With seven pairs, the last batch leaves one process without a row.
    "uneven": (7, 3, ()),
    # With eight pairs, each process has one of the clusters, to which donors are confined.
    "hard negatives": (8, 4, ("--hard-negatives", "both", "--cluster-size", "4", "--n-sync", "2")),
}


@pytest.fixture(scope="module")
def folder(dataset: Any, tiny_spec: str, text_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of each run, by one process and by two."""
    folder = tmp_path_factory.mktemp("distributed")

    def flags(name: str, processes: int) -> list[str]:
        count, rows, more = RUNS[name]
        pairs = folder / f"{name}.jsonl"
        pairs.write_text("".join(dataset.pairs.read_text().splitlines(keepends=True)[:count]))
        values: dict[str, Any] = {
            "catalog": dataset.catalog,
            "pairs": pairs,
            "image-root": dataset.folder,
            "image-encoder": tiny_spec,
            "text-encoder": text_spec,
            "out": folder / f"{name} {processes}",
            "cache-dir": folder / "cache",
            "epochs": 3,
            "batch-size": 2 * rows // processes,
            "lr": 0.003,
            "width": 16,
            "heads": 2,
            "dropout": 0,
            "max-tokens": 16,
            "device": "cpu",
        }
        given = [part for option, value in values.items() for part in (f"--{option}", str(value))]
        return [*given, "--no-half", "--json", *more]

    for name in RUNS:
        assert CliRunner().invoke(train, flags(name, 1)).exit_code == 0
    (folder / "train.py").write_text(TRAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs = json.dumps([[free_port(), flags(name, 2)] for name in RUNS])
    command = [*launcher, str(folder / "train.py"), runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(RUNS)  # one process reports
    return folder


def result_of(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the rows of the log and the weights."""
    rows = [json.loads(line) for line in out.with_name(f"{out.name}.train.jsonl").read_text().splitlines()]
    return [row for row in rows if "mean_loss" in row], load_file(out / "adaptor.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one_with_twice_the_batch(folder: Path, name: str) -> None:
    (one, one_weights), (two, two_weights) = (result_of(folder / f"{name} {processes}") for processes in (1, 2))
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["mean_loss"] == pytest.approx(theirs["mean_loss"], rel=1e-4)
        assert ours["logit_scale"] == pytest.approx(theirs["logit_scale"], rel=1e-5)
    for weight, values in one_weights.items():
        if not weight.endswith("key.bias"):  # the softmax ignores it: its gradient is rounding error
            torch.testing.assert_close(two_weights[weight], values, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_shares_cover_a_batch_without_overlap(count: int) -> None:
    shares = [list(range(count))[Group(rank=rank, size=3).share(count)] for rank in range(3)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
