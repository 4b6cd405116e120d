"""The GPU benchmark without a GPU: its rules, a small run on the CPU, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import pytest

from benchmarks.generator import split_cores
from benchmarks.gpu import busy, shares


@pytest.mark.parametrize(
    ("cores", "generator", "service"),
    [(range(16), {12, 13, 14, 15}, set(range(12))), ([3, 5], {5}, {3}), ([7], {7}, {7})],
)
def test_cores_are_split(
    cores: Iterable[int], generator: set[int], service: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    assert split_cores(4) == (generator, service)


def test_shares_of_the_encoder_and_of_the_gpus_time() -> None:
    found = shares(
        {
            "encoder_alone": {"batches": {"32": {"session_per_s": 500.0, "encode_per_s": 400.0}}},
            "search_alone": {"batches": {"32": {"candidates": {"p50_ms": 16.0}}}},
            "services": {"full": {"per_s": 250.0}},
        }
    )
    assert found == {"of_encoder_loop": 0.625, "gpu_work_share": 0.625}  # 2 ms and 0.5 ms for an image


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


def test_a_small_run_on_the_cpu(small_bundle: Path) -> None:
    command = [
        sys.executable, "-m", "benchmarks.gpu", "measure", "--folder", str(small_bundle), "--device", "cpu",
        "--seconds", "1.5", "--services", "2", "--connections", "4",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    figures = outcome["figures"]
    assert figures["encoder_alone"]["batches"]["32"]["session_per_s"] > 0
    assert figures["search_alone"]["batches"]["32"]["search"]["p99_ms"] > 0
    full = figures["services"]["full"]
    assert full["per_s"] > 0
    assert full["failures"] == {}
    assert figures["shares"]["of_encoder_loop"] > 0
    assert figures["services"]["one_at_a_time"]["stages_ms"]["encode"] > 0


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_a_missing_gpu_is_one_line_of_error(small_bundle: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "measure", "--folder", str(small_bundle), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: device cuda" in done.stderr.splitlines()[-1]
