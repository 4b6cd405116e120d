"""Synthetic bodies, embeddings and bundles have the properties that the benchmarks rely on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import pytest

from benchmarks import synthetic
from index.bundle import Bundle
from index.embeddings import EmbeddingShards, vectors_file
from index.gpu import clonable
from index.manifest import INDEX_FILE
from index.store import EntityStore, StoredEntity


def test_hostile_bodies_vary_and_repeat_with_the_seed() -> None:
    bodies = list(synthetic.hostile_bodies(500))
    assert bodies == list(synthetic.hostile_bodies(500))
    assert len({body for body, _ in bodies}) > 400
    assert {claimed for _, claimed in bodies} >= {"image/jpeg", "image/png", "image/webp", "image/gif"}
    assert list(islice(synthetic.hostile_bodies(500, seed=1), 5)) != bodies[:5]


def test_embeddings_have_the_structure_of_real_ones(tmp_path: Path) -> None:
    synthetic.write_embeddings(tmp_path / "embeddings", 9000, 32)
    embeddings = np.concatenate(list(EmbeddingShards(tmp_path / "embeddings", 32)))
    assert embeddings.shape == (9000, 32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert float(np.mean(embeddings[:2000] @ embeddings[-2000:].T)) > 0.2  # a cone
    nearest = np.sort(embeddings[:500] @ embeddings.T, axis=1)
    assert float(np.median(nearest[:, -2])) > 0.4 + float(np.median(nearest))  # clusters
    variances = np.sort(np.linalg.eigvalsh(np.cov(embeddings.T)))
    assert variances[-1] > 4 * variances[0]  # some directions more than others


def test_threads_do_not_change_the_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, cores in (("one", 1), ("several", 2)):
        monkeypatch.setattr(synthetic, "usable_cores", lambda cores=cores: cores)
        synthetic.write_embeddings(tmp_path / folder, 9000, 8)
    assert len(list((tmp_path / "several").iterdir())) == 6
    for shard in range(3):
        one, several = (np.load(tmp_path / folder / vectors_file(shard)) for folder in ("one", "several"))
        assert np.abs(one.astype(np.float32) - several).max() < 1e-3


def test_fewer_embeddings_are_the_first_ones(tmp_path: Path) -> None:
    for name, count in (("all", 9000), ("first", 4000)):
        synthetic.write_embeddings(tmp_path / name, count, 8)
    all_ND, first_ND = (np.concatenate(list(EmbeddingShards(tmp_path / name, 8))) for name in ("all", "first"))
    np.testing.assert_allclose(all_ND[:4000], first_ND, atol=1e-3)


def test_the_store_can_be_read(tmp_path: Path) -> None:
    synthetic.write_store(tmp_path / "entities.sqlite", 100)
    with EntityStore(tmp_path / "entities.sqlite") as store:
        assert len(store) == 100
        last = StoredEntity(
            row=99, entity_id="Q99", title="Thing 99 of kind 99", titles={}, url=None, types=("type 49",), symbol=None,
            description="A synthetic thing, number 99.", image_count=1, has_text=True,
        )  # fmt: skip
        assert store.by_rows([99]) == [last]


@pytest.mark.parametrize(("device", "kind"), [("cuda", faiss.IndexPQ), ("cpu", faiss.IndexFlat)])
def test_the_gpu_bundle_can_be_searched(small_bundle: Path, tmp_path: Path, device: str, kind: type) -> None:
    bundle = tmp_path / "bundle"
    synthetic.write_vit_bundle(bundle, Bundle.open(small_bundle), "vit-b32-2-layers", 500, search_device=device)
    opened = Bundle.open(bundle)
    assert opened.manifest.counts.entities == len(opened.index()) == 500
    index = faiss.read_index(str(bundle / INDEX_FILE))
    assert isinstance(index, kind)
    assert clonable(index) is None  # so a GPU searches the embeddings, exactly
