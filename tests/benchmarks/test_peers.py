"""The peers do the same work as the service, and the ratios compare them correctly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peer_servers import Recognizer, make_decoder
from benchmarks.peers import REPORT, ratios
from benchmarks.synthetic import photograph
from core.errors import UserError
from imaging import Preprocessing, load_pixels, normalise
from index.bundle import Bundle


def test_both_decoders_give_close_pixels() -> None:
    given = {
        "size_px": 96, "resize": "shortest", "crop": "center", "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    data = photograph(0, 640, 480)
    theirs, ours = (make_decoder({"decoder": kind, "preprocessing": given})(data) for kind in ("own", "ours"))
    assert theirs.shape == ours.shape == (3, 96, 96)
    assert 0 < np.abs(theirs - ours).mean() < 0.03  # ours decodes at a reduced size
    preprocessing = Preprocessing.from_dict(given)
    assert np.array_equal(ours, normalise(load_pixels(data, preprocessing, max_pixels=10**6)[None], preprocessing)[0])


def test_a_peer_finds_the_bundles_entities(small_bundle: Path, small_images: dict[str, bytes], tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    embeddings = bundle.embeddings()
    np.save(tmp_path / "vectors.npy", np.concatenate(list(embeddings)))
    (tmp_path / "ids.json").write_text(json.dumps([f"row {row}" for row in embeddings.rows_N]))
    job = {
        "onnx": str(bundle.image_encoder_path), "input": "pixel_values", "output": "image_embedding", "threads": 1,
        "vectors": str(tmp_path / "vectors.npy"), "ids": str(tmp_path / "ids.json"),
        "decoder": "own", "preprocessing": dict(bundle.manifest.preprocessing),
    }  # fmt: skip
    decode = make_decoder(job)
    answers = Recognizer(job).recognize([decode(data) for data in small_images.values()])
    with bundle.store() as store:
        rows = [store.get(entity_id).row for entity_id in small_images]
    assert [answer["entities"][0] for answer in answers] == [f"row {row}" for row in rows]


def test_ratios_compare_with_the_best_peer_of_each_decoder() -> None:
    systems = {
        "wikiclip": {"per_s": 60.0, "p50_ms": 10.0, "p99_ms": 20.0},
        "a, its own decoder": {"per_s": 30.0, "p50_ms": 10.0, "p99_ms": 100.0},
        "b, its own decoder": {"per_s": 20.0, "p50_ms": 10.0, "p99_ms": 30.0},
        "a, our decoder": {"per_s": 50.0, "p50_ms": 10.0, "p99_ms": 25.0},
    }
    found = ratios(systems)
    assert found == {
        "its own decoder": {"throughput": 2.0, "p99": 1.5},
        "our decoder": {"throughput": 1.2, "p99": 1.25},
    }
    assert all("a, our decoder" in plot.svg({"systems": systems}) for plot in REPORT.plots)


def test_a_missing_environment_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    with pytest.raises(UserError, match="without --smoke"):
        peers.environment_python("mosec", install=False)


def test_the_servers_import_only_core_of_this_project() -> None:
    probe = "import sys, benchmarks.peer_servers; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=peers.ROOT)
    assert not {"index", "service", "imaging", "torch", "httpx", "pydantic"} & set(done.stdout.split())
