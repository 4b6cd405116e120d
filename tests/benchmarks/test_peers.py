"""Other servers beside this one: what they run is the same work, and figures mean what they say."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.closed_loop import Job, run_job
from benchmarks.peers import environments
from benchmarks.peers.runner import ratios, report
from benchmarks.peers.workload import Recogniser, as_pixels, decoder
from benchmarks.server import running_service
from benchmarks.synthetic import photograph
from imaging import Preprocessing, load_pixels, normalise
from index.bundle import Bundle


@pytest.mark.parametrize(("resize", "crop"), [("shortest", "center"), ("squash", "none")])
def test_the_peers_own_preprocessing_is_nearly_ours(resize: str, crop: str) -> None:
    given = {
        "size_px": 96, "resize": resize, "crop": crop, "interpolation": "bicubic",
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4],
    }  # fmt: skip
    data = photograph(0, 640, 480)
    theirs = as_pixels(Image.open(io.BytesIO(data)), given)
    preprocessing = Preprocessing.from_dict(given)
    ours = normalise(load_pixels(data, preprocessing, max_pixels=10**6)[None], preprocessing)[0]
    assert theirs.shape == ours.shape == (3, 96, 96)
    assert np.abs(theirs - ours).mean() < 0.03  # one decodes at full size, one at a reduced one
    assert np.array_equal(decoder({"decoder": "ours", "preprocessing": given})(data), ours)


def test_a_peer_finds_what_the_bundle_holds(small_bundle: Path, small_images: dict[str, bytes], tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    embeddings = bundle.embeddings()
    np.save(tmp_path / "vectors.npy", np.concatenate(list(embeddings)))
    (tmp_path / "ids.json").write_text(json.dumps([f"row {row}" for row in embeddings.rows_N]))
    wanted = {
        "onnx": str(bundle.image_encoder_path), "input": "pixel_values", "output": "image_embedding", "threads": 1,
        "vectors": str(tmp_path / "vectors.npy"), "ids": str(tmp_path / "ids.json"),
        "decoder": "own", "preprocessing": dict(bundle.manifest.preprocessing),
    }  # fmt: skip
    decode = decoder(wanted)
    answers = Recogniser(wanted).recognise([decode(data) for data in small_images.values()])
    with bundle.store() as store:
        rows = [store.get(entity_id).row for entity_id in small_images]
    assert [answer["entities"][0] for answer in answers] == [f"row {row}" for row in rows]


def test_the_closed_loop_counts_answers_and_failures(
    small_bundle: Path, small_images: dict[str, bytes], tmp_path: Path
) -> None:
    image, broken = tmp_path / "image.jpg", tmp_path / "broken.jpg"
    image.write_bytes(small_images["Q15083"])
    broken.write_bytes(b"no image")
    with running_service(small_bundle, "--log-level", "warning", "--threads", "1") as url:
        for field, polls in (("image", False), (None, False), (None, True)):
            job = Job(
                url=f"{url}/recognize", images=[str(image), str(broken)], field=field, connections=2, warm_up_s=0.0,
                seconds=2.0, polls=polls,
            )  # fmt: skip
            figures = run_job(job, tmp_path, os.sched_getaffinity(0))
            assert figures["answers"] > 0
            assert set(figures["failures"]) == {"422"}
            assert figures["p50_ms"] <= figures["p99_ms"]


def test_a_ratio_is_against_the_best_of_those_that_decode_alike() -> None:
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
    figures = {
        "systems": systems, "ratios": found, "left_out": {"c": "it cannot be <installed>"}, "image": "JPEG",
        "connections": 8, "threads": 1, "cores": {"generator": [1], "server": [0]},
    }  # fmt: skip
    html = report(figures)
    assert "it cannot be &lt;installed&gt;" in html
    assert html.count("<table>") == 3


def test_a_peer_whose_environment_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    with pytest.raises(environments.NoEnvironment, match="without --smoke"):
        environments.interpreter("mosec", make=False)


def test_a_peers_server_needs_nothing_of_this_project_but_the_decoder() -> None:
    probe = "import sys, benchmarks.peers.workload; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=environments.ROOT
    )
    assert not {"index", "service", "core", "imaging", "torch", "httpx"} & set(done.stdout.split())
