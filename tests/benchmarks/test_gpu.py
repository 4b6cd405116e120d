"""The GPU benchmark without a GPU: its rules, a small run on the CPU, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks.generator import split_cores
from benchmarks.gpu import SyntheticEmbeddings, busy


@pytest.mark.parametrize(
    ("cores", "generator", "service"),
    [(range(16), {12, 13, 14, 15}, set(range(12))), ([3, 5], {5}, {3}), ([7], {7}, {7})],
)
def test_cores_are_split(
    cores: Iterable[int], generator: set[int], service: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    assert split_cores(4) == (generator, service)


def test_busy_between_two_snapshots() -> None:
    def usage(times: int) -> dict[str, float]:
        stages = {"decode": 0.3, "queue": 0.1, "encode": 0.4, "search": 0.1}
        return {
            "process_cpu_seconds_total": 1.0 * times,
            "wikiclip_batch_images_sum": 10.0 * times,
            "wikiclip_batch_images_count": 2.0 * times,
            **{f'wikiclip_stage_seconds_sum{{stage="{name}"}}': each * times for name, each in stages.items()},
            **{f'wikiclip_stage_seconds_count{{stage="{name}"}}': 10.0 * times for name in stages},
        }

    found = busy([usage(1), usage(1)], [usage(2), usage(2)], seconds=2.0, cores=4)
    assert found["cores_busy"] == 0.25  # one CPU second in two, for each of two services with two cores
    assert found["batch_images"] == 5.0
    assert found["stages_ms"] == {"decode": 30.0, "queue": 10.0, "encode": 40.0, "search": 10.0}


def test_synthetic_embeddings_are_made_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu._PART", 300)
    embeddings = SyntheticEmbeddings(700, 16)
    parts = [embeddings.stored_part(number) for number in range(embeddings.parts)]
    assert [len(part) for part in parts] == [300, 300, 100]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 700


def test_a_small_run_on_the_cpu(small_bundle: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--folder", str(small_bundle), "--device", "cpu",
        "--seconds", "0.3", "--services", "2", "--connections", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures"]
    assert figures["encoder"]["batches"]["32"]["session_per_s"] > 0
    assert figures["search"]["768"]["32"]["times_reading"] > 0
    assert figures["search"]["faiss"] == {"left_out": "this faiss has no GPU"}
    assert figures["claim"]["13B"] == {"left_out": "it needs a GPU"}
    services = figures["services"]["2"]
    assert services["full"]["per_s"] > 0
    assert services["full"]["failures"] == {}
    assert services["of_encoder_loop"] > 0
    assert services["one_at_a_time"]["stages_ms"]["encode"] > 0


def test_phases_without_time_are_left_out(small_bundle: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.gpu", "--folder", str(small_bundle), "--device", "cpu", "--minutes", "0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["services"]["4"] == {"left_out": "no time was left"}


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_a_missing_gpu_is_one_line_of_error(small_bundle: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(small_bundle), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: device cuda" in done.stderr.splitlines()[-1]
