"""`wikiclip bench` as a user runs it, on a small bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import run_wikiclip


@pytest.mark.parametrize("name", ["service", "index", "train", "export"])
def test_bench_prints_one_object_with_what_it_ran_on(small_bundle: Path, tmp_path: Path, name: str) -> None:
    size = ("--vectors", 500, "--dim", 16) if name == "index" else ()
    done = run_wikiclip("bench", name, "--smoke", "--json", "--bundle", small_bundle, "--results", tmp_path, *size)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome.keys() >= {"hardware", "commit", "settings", "figures"}
    if name == "service":
        own = outcome["figures"]["encoders"]["own"]
        assert min(own[key] for key in ("service_p50_ms", "loop_p50_ms", "service_cpu_ms", "share")) > 0
        assert own["failures"] == 0
    elif name == "export":
        assert (
            0
            < outcome["figures"]["throughput"]["share_of_slowest"]
            <= outcome["figures"]["throughput"]["share_of_all_models"]
        )
        assert len(list(tmp_path.glob("*/export.html"))) == 1
    elif name == "train":
        assert outcome["figures"]["pairs"] == 32
        assert outcome["figures"]["ratio"] > 1
    else:
        assert outcome["figures"]["batch_64_queries_per_s"] > 0
    assert len(list(tmp_path.glob(f"*/{name}.json"))) == 1
