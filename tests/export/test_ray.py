"""An export on a local Ray cluster gives the bundle of the local engine, even when a worker is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from catalog.images import TarShards
from core.errors import CatalogError, UserError
from export.config import ExportConfig
from export.pipeline import export_bundle
from export.staging import StagingDir
from index.bundle import Bundle

ray = pytest.importorskip("ray")
CatalogFiles = Any  # the class is in conftest.py, which cannot be imported
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster with room for two embedding and two decoding workers."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # 30 by default: too short on busy cores
    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=200_000_000, _node_ip_address="127.0.0.1",
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, checkpoint: Path) -> ExportConfig:
    """The common catalog with its bad records, and 80 entities with a text: 26 shards."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "images").symlink_to(catalog.path.parent / "images")
    more = [{"entity_id": f"M{n}", "title": f"More {n}", "text": f"Thing {n}.", "images": []} for n in range(80)]
    path = folder / "catalog.jsonl"
    path.write_text(catalog.path.read_text() + "".join(json.dumps(row) + "\n" for row in more))
    return ExportConfig(
        catalog=path, checkpoint=checkpoint, out=folder / "local" / "things", shard_size=4, batch_size=3,
        thumbnail_px=16, store_text=True, device="cpu",
    )  # fmt: skip


def embedding_workers() -> set[int]:
    """Return the embedding processes, by the title that Ray gives them."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"MapWorker(MapBatches(_Embed))" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def files(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if name.endswith("manifest.json"):
            values = json.loads(path.read_bytes())
            content[name] = {key: value for key, value in values.items() if key not in ("created_at", "elapsed_s")}
        else:
            content[name] = path.read_bytes()
    return content


class StoppedError(Exception):
    pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_the_bundle_equals_the_local_one_although_a_worker_is_killed(
    cluster: None, config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a base, and resume an export that the local engine began."""
    base = dataclasses.replace(config, out=tmp_path / "base", limit=20)
    export_bundle(base)
    config = dataclasses.replace(config, base=base.out)
    copied = export_bundle(config).copied_entities
    assert 10 < copied < 20  # unreadable images are tried again
    on_ray = dataclasses.replace(config, out=tmp_path / "ray" / "things", resume=True)
    finish, written, killed = StagingDir.finish_shard, 0, set[int]()

    def stop(self: StagingDir, number: int, shard: Any) -> None:
        nonlocal written
        if written == 3:
            raise StoppedError
        written += 1
        finish(self, number, shard)

    with monkeypatch.context() as patch:
        patch.setattr(StagingDir, "finish_shard", stop)
        with pytest.raises(StoppedError):
            export_bundle(on_ray)

    def kill_then_finish(self: StagingDir, number: int, shard: Any) -> None:
        if not killed:
            deadline = time.monotonic() + 120
            while len(workers := embedding_workers()) < 2:
                assert time.monotonic() < deadline, "two workers were to embed"
                time.sleep(0.01)
            killed.add(min(workers))
            os.kill(min(workers), signal.SIGKILL)
        finish(self, number, shard)

    monkeypatch.setattr(StagingDir, "finish_shard", kill_then_finish)
    summary = export_bundle(dataclasses.replace(on_ray, engine="ray"))
    assert len(killed) == 1
    assert (summary.shards, summary.resumed_shards) == (26, 3)
    assert 0 < summary.copied_entities < copied
    Bundle.open(on_ray.out, verify="full")
    expected, found = files(config.out), files(on_ray.out)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name
    assert (on_ray.out.parent / "rejected.jsonl").read_bytes() == (config.out.parent / "rejected.jsonl").read_bytes()


def test_a_workers_error_is_one_line(cluster: None, config: ExportConfig, tmp_path: Path) -> None:
    """Delete a tar shard that its index still lists."""
    folder, url = tmp_path / "images", "https://example.org/1.png"
    with TarShards(folder, shard_bytes=10_000) as shards:
        shards.add(url, b"no image", "image/png", {})
    next(folder.glob("*.tar")).unlink()
    path = tmp_path / "catalog.jsonl"
    path.write_text(json.dumps({"entity_id": "Q1", "title": "One", "text": "One.", "images": [url]}) + "\n")
    broken = dataclasses.replace(config, catalog=path, images=folder, out=tmp_path / "out", engine="ray")
    with pytest.raises(CatalogError, match=r"00000\.tar") as caught:
        export_bundle(broken)
    assert "\n" not in str(caught.value)


def test_ray_is_not_installed(config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--engine ray needs ray: pip install"):
        export_bundle(dataclasses.replace(config, out=tmp_path / "out", engine="ray"))
