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


FULL = {"per_s": 250.0, "generator_busy": 0.3, "cores_busy": 0.4, "http_thread_busy": 0.2, "engine_busy": 0.95}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"generator_busy": 0.99, "cores_busy": 0.95}, "load generator"),
        ({"per_s": 390.0}, "GPU"),
        ({"cores_busy": 0.93}, "cores of the services"),
        ({"http_thread_busy": 0.91}, "HTTP thread"),
        ({}, "engine"),
        ({"engine_busy": 0.7}, None),
    ],
)
def test_the_first_full_part_limits_the_service(changes: dict[str, float], expected: str | None) -> None:
    full = FULL | changes
    found = shares(
        {
            "encoder_alone": {"batches": {"32": {"session_per_s": 500.0, "encode_per_s": 400.0}}},
            "search_alone": {"batches": {"32": {"candidates": {"p50_ms": 16.0}}}},
            "services": {"full": full},
        }
    )
    assert found["limited_by"] == expected
    assert found["of_encoder_loop"] == pytest.approx(full["per_s"] / 400, abs=1e-3)
    assert found["gpu_work_share"] == pytest.approx(full["per_s"] * 2.5e-3, abs=1e-3)  # 2 ms and 0.5 ms for an image


def test_busy_between_two_snapshots() -> None:
    def usage(times: int, **others: float) -> dict[str, float]:
        stages = {"decode": 0.3, "queue": 0.1, "encode": 0.4, "search": 0.1}
        return {
            "process_cpu_seconds_total": 1.0 * times,
            'wikiclip_images_total{outcome="answered"}': 10.0 * times,
            "wikiclip_batch_images_sum": 10.0 * times,
            "wikiclip_batch_images_count": 2.0 * times,
            **{f'wikiclip_stage_seconds_sum{{stage="{name}"}}': each * times for name, each in stages.items()},
            **{f'wikiclip_stage_seconds_count{{stage="{name}"}}': 10.0 * times for name in stages},
            **others,
        }

    before, after = usage(1, at_s=5.0, main_thread_s=1.0), usage(2, at_s=7.0, main_thread_s=1.5)
    found = busy([before, before], [after, after], cores=4)
    assert found["cpu_ms_per_image"] == 100.0
    assert found["cores_busy"] == 0.25  # one CPU second in two, for each of two services with two cores
    assert found["http_thread_busy"] == 0.25
    assert found["batch_images"] == 5.0
    assert found["stages_ms"] == {"decode": 30.0, "queue": 10.0, "encode": 40.0, "search": 10.0}
    assert found["engine_busy"] == 0.05  # two batches of 50 ms in two seconds


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
