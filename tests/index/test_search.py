"""Search equals a slow, obvious loop: each entity once, with the true cosine of its best image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from core.arrays import normalised
from core.errors import BundleAltered, UserError
from index import search
from index.build import build_index
from index.embeddings import Embeddings, EmbeddingShards, Pooling, pooled, write_shard
from index.manifest import INDEX_FILE
from index.remembered import Remembered
from index.search import EntityIndex
from index.store import Selection

DIM = 24
ATOL: dict[Pooling, float] = {"nearest": 1e-5, "mean": 5e-4}  # means are rounded to float16


def make(
    folder: Path,
    rows_N: list[int],
    *,
    factory: str = "Flat",
    seed: int = 0,
    shard_size: int = 97,
    pooling: Pooling = "nearest",
) -> tuple[EntityIndex, EmbeddingShards]:
    rng = np.random.default_rng(seed)
    vectors_ND = rng.normal(size=(len(rows_N), DIM)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    (folder / "embeddings").mkdir()
    for shard, start in enumerate(range(0, len(rows_N), shard_size)):
        part = slice(start, start + shard_size)
        write_shard(folder / "embeddings", shard, np.array(rows_N[part], np.int64), vectors_ND[part])
    embeddings = EmbeddingShards(folder / "embeddings", DIM)
    searched = pooled(embeddings, pooling)
    manifest = build_index(folder, searched, factory=factory)
    return EntityIndex.read(folder / INDEX_FILE, searched, manifest.parameters), embeddings


def queries(count: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def slow_search(
    embeddings: EmbeddingShards,
    query_D: npt.NDArray[Any],
    top_k: int,
    selection: Selection | None = None,
    pooling: Pooling = "nearest",
) -> list[tuple[int, float]]:
    best: dict[int, float] = {}
    all_ND = np.concatenate(list(embeddings))
    for row, image_D in zip(embeddings.rows_N.tolist(), all_ND, strict=True):
        if selection is not None and not selection.allowed_E[row]:
            continue
        vector_D = mean_of(all_ND[embeddings.rows_N == row]) if pooling == "mean" else image_D
        cosine = float(vector_D @ query_D / np.linalg.norm(vector_D) / np.linalg.norm(query_D))
        best[row] = max(cosine, best.get(row, -2.0))
    return sorted(best.items(), key=lambda item: (-item[1], item[0]))[:top_k]


def mean_of(images_ID: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the mean as a bundle would store it."""
    mean_D = images_ID.mean(axis=0)
    return (mean_D / np.linalg.norm(mean_D)).astype(np.float16).astype(np.float32)


CATALOGS = {
    "one image each": list(range(300)),
    "some with several": [row for row in range(120) for _ in range(1 + row % 4)],
    "one with nearly all": [0] * 290 + list(range(1, 11)),
    "a single entity": [0] * 5,
}


@pytest.mark.parametrize("pooling", ["nearest", "mean"])
@pytest.mark.parametrize("top_k", [1, 5, 100])
@pytest.mark.parametrize("rows_N", CATALOGS.values(), ids=CATALOGS.keys())
def test_exact_search_equals_a_slow_loop(tmp_path: Path, rows_N: list[int], top_k: int, pooling: Pooling) -> None:
    index, embeddings = make(tmp_path, rows_N, pooling=pooling)
    queries_BD = queries(7)
    rows_BK, scores_BK = index.search(queries_BD, top_k)
    assert rows_BK.shape == scores_BK.shape == (7, top_k)
    for query_D, rows_K, scores_K in zip(queries_BD, rows_BK, scores_BK, strict=True):
        expected = slow_search(embeddings, query_D, top_k, pooling=pooling)
        found = rows_K[rows_K >= 0]
        assert found.tolist() == [row for row, _ in expected]
        np.testing.assert_allclose(scores_K[: len(found)], [score for _, score in expected], atol=ATOL[pooling])
        assert np.all(rows_K[len(found) :] == -1)


@pytest.mark.parametrize(("images_each", "pooling"), [(1, "nearest"), (2, "nearest"), (2, "mean")])
@pytest.mark.parametrize(
    "factory",
    [
        "HNSW16",
        "IVF8,Flat",
        "IVF8,PQ8x4fs,RFlat",
        "IVF8(SQfp16),PQ12x4fsr",
        "SQ8",
        "PCA16,Flat",
        "PQ12x4",
        "OPQ8,IVF4,PQ8x4",
    ],
)
def test_any_factory_gives_true_cosines_and_mostly_the_right_entities(
    tmp_path: Path, factory: str, images_each: int, pooling: Pooling
) -> None:
    rows_N = [row for row in range(600) for _ in range(images_each)]
    index, embeddings = make(tmp_path, rows_N, factory=factory, pooling=pooling)
    queries_BD = queries(20)
    rows_BK, scores_BK = index.search(queries_BD, 10)
    overlap = 0
    for query_D, rows_K, scores_K in zip(queries_BD, rows_BK, scores_BK, strict=True):
        truth = dict(slow_search(embeddings, query_D, 1000, pooling=pooling))
        assert len(set(rows_K.tolist())) == 10
        np.testing.assert_allclose(scores_K, [truth[row] for row in rows_K.tolist()], atol=ATOL[pooling])
        assert np.all(np.diff(scores_K) <= 0)
        overlap += len(set(rows_K.tolist()) & set(list(truth)[:10]))
    assert overlap >= 0.5 * 200


@pytest.mark.parametrize("allowed", [0, 1, 3, 60], ids=lambda count: f"{count} allowed")
@pytest.mark.parametrize(
    "factory",
    ["Flat", "HNSW16", "IVF8_HNSW32,PQ12x4fs", "IVF8(SQfp16),PQ12x4fsr", "PQ12x4fs", "PQ12x4fs,RFlat", "PCA16,Flat"],
)
@pytest.mark.parametrize("scanned_at_most", [0, 10_000], ids=["by the index", "by a scan"])
def test_a_selection_is_exact_even_when_a_handful_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, allowed: int, scanned_at_most: int
) -> None:
    monkeypatch.setattr(search, "_MAX_SCANNED", scanned_at_most)
    index, embeddings = make(tmp_path, [row for row in range(300) for _ in range(1 + row % 3)], factory=factory)
    allowed_E = np.zeros(300, np.bool_)
    allowed_E[np.random.default_rng(2).choice(300, allowed, replace=False)] = True
    selection = Selection(("some",), allowed_E)
    queries_BD = queries(6)
    rows_BK, scores_BK = index.search(queries_BD, 5, selection=selection)
    right = 0
    for query_D, rows_K, scores_K in zip(queries_BD, rows_BK, scores_BK, strict=True):
        expected = slow_search(embeddings, query_D, 5, selection)
        found = rows_K[rows_K >= 0]
        assert len(found) == len(set(found.tolist())) == min(allowed, 5)
        assert allowed_E[found].all()
        truth = dict(slow_search(embeddings, query_D, 300, selection))
        np.testing.assert_allclose(scores_K[: len(found)], [truth[row] for row in found.tolist()], atol=1e-5)
        right += len(set(found.tolist()) & {row for row, _ in expected})
    assert right >= (0.9 if scanned_at_most == 1 and allowed == 60 else 1) * 6 * min(allowed, 5)


@pytest.mark.parametrize("top_k", [1, 7, 10])
@pytest.mark.parametrize("rows_N", CATALOGS.values(), ids=CATALOGS.keys())
def test_half_precision_finds_what_exact_search_finds(tmp_path: Path, rows_N: list[int], top_k: int) -> None:
    for name in ("flat", "half"):
        (tmp_path / name).mkdir()
    exact, _ = make(tmp_path / "flat", rows_N)
    close, _ = make(tmp_path / "half", rows_N, factory="SQfp16")
    assert (exact.candidates.exact, close.candidates.exact) == (True, False)
    for found, expected in zip(close.search(queries(20), top_k), exact.search(queries(20), top_k), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_search_suffices_for_entities_with_many_images(tmp_path: Path) -> None:
    index, _ = make(tmp_path, [row for row in range(100) for _ in range(5)], factory="SQfp16")
    asked: list[int] = []
    search = index.candidates.search

    def counted(queries_QD: Any, count: int, *rest: Any) -> Any:
        asked.append(count)
        return search(queries_QD, count, *rest)

    index.candidates.search = counted  # type: ignore[method-assign]
    index.search(queries(1), 10)
    assert asked[0] >= 50


@pytest.mark.parametrize("shard_size", [3, 50, 1000])
def test_means_are_those_of_stored_images_whatever_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    """Entities cross shards, fill several, or have gaps between them."""
    monkeypatch.setattr("index.embeddings._ENTITIES_AT_ONCE", 10)
    rows_N = [0] * 7 + [2, 2, 3] + [5] * 4 + [row for row in range(6, 40) for _ in range(row % 3)]
    _, images = make(tmp_path, rows_N, shard_size=shard_size)
    means = pooled(images, "mean")
    all_ND = np.concatenate(list(images))
    expected = [mean_of(all_ND[images.rows_N == row]) for row in means.rows_N]
    assert means.rows_N.tolist() == sorted(set(rows_N))
    np.testing.assert_allclose(np.concatenate(list(means)), expected, atol=5e-4)
    order = np.random.default_rng(0).permutation(len(means))
    np.testing.assert_array_equal(means.at(order), np.concatenate(list(means))[order])
    np.testing.assert_array_equal(means.images_of(5), all_ND[10:14])
    assert means.images_of(1).shape == (0, DIM)


def test_a_selection_applies_to_one_call_only(tmp_path: Path) -> None:
    index, _ = make(tmp_path, list(range(300)), factory="IVF8_HNSW32,PQ12x4fs")
    before, _ = index.search(queries(5), 5)
    for start in (0, 100):
        allowed_E = np.zeros(300, np.bool_)
        allowed_E[start : start + 100] = True
        rows_BK, _ = index.search(queries(5), 5, selection=Selection((), allowed_E))
        assert np.all((rows_BK >= start) & (rows_BK < start + 100))
    after, _ = index.search(queries(5), 5)
    assert before.tolist() == after.tolist()


def test_parameters_apply_to_one_call_only(tmp_path: Path) -> None:
    index, embeddings = make(tmp_path, list(range(500)), factory="IVF32,Flat")
    queries_BD = queries(20)
    before, _ = index.search(queries_BD, 10)
    everything, _ = index.search(queries_BD, 10, {"nprobe": 32})
    after, _ = index.search(queries_BD, 10)
    assert everything.tolist() == [[row for row, _ in slow_search(embeddings, query, 10)] for query in queries_BD]
    assert before.tolist() == after.tolist() != everything.tolist()


def test_an_embedding_finds_itself_with_score_one(tmp_path: Path) -> None:
    index, embeddings = make(tmp_path, list(range(50)))
    rows_BK, scores_BK = index.search(3 * np.concatenate(list(embeddings)), 1)
    assert rows_BK[:, 0].tolist() == list(range(50))
    assert np.all(scores_BK <= 1)
    assert np.all(scores_BK > 0.99999)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "SQ8"])
@pytest.mark.parametrize("pooling", ["nearest", "mean"])
@pytest.mark.parametrize("handicap", [0.0, 0.15])
def test_remembered_vectors_raise_scores_as_in_a_slow_loop(
    tmp_path: Path, factory: str, pooling: Pooling, handicap: float
) -> None:
    rows_N = [row for row in range(90) for _ in range(1 + row % 3)]
    index, embeddings = make(tmp_path, rows_N, factory=factory, pooling=pooling)
    vectors_MD = normalised(np.random.default_rng(3).normal(size=(30, DIM)).astype(np.float32)).astype(np.float16)
    remembered_rows_M = np.arange(0, 90, 3)
    index.remembered = Remembered(Embeddings(DIM, [vectors_MD], [remembered_rows_M]), handicap)
    queries_BD = np.concatenate([queries(10), 2 * vectors_MD[:5].astype(np.float32)])
    some = Selection((), np.random.default_rng(4).random(90) < 0.5)
    for top_k, selection in ((1, None), (7, some), (100, None), (100, some)):
        rows_BK, scores_BK = index.search(queries_BD, top_k, {"nprobe": 8}, selection)
        for query_D, rows_K, scores_K in zip(queries_BD, rows_BK, scores_BK, strict=True):
            expected = dict(slow_search(embeddings, query_D, 1000, selection, pooling))
            for row, score_M in zip(remembered_rows_M.tolist(), normalised(vectors_MD) @ query_D, strict=True):
                if row in expected:
                    expected[row] = max(expected[row], score_M / np.linalg.norm(query_D) - handicap)
            best = sorted(expected.items(), key=lambda item: (-item[1], item[0]))[:top_k]
            assert rows_K[: len(best)].tolist() == [row for row, _ in best]
            np.testing.assert_allclose(scores_K[: len(best)], [score for _, score in best], atol=ATOL[pooling])
            assert rows_K[len(best) :].tolist() == [-1] * (top_k - len(best))


def test_one_query_equals_a_batch(tmp_path: Path) -> None:
    index, _ = make(tmp_path, list(range(200)))
    queries_BD = queries(30)
    together, _ = index.search(queries_BD, 5)
    alone = [index.search(query_D[None], 5)[0][0].tolist() for query_D in queries_BD]
    assert together.tolist() == alone


def test_no_queries(tmp_path: Path) -> None:
    index, _ = make(tmp_path, list(range(5)))
    rows_BK, _ = index.search(np.empty((0, DIM), np.float32), 5)
    assert rows_BK.shape == (0, 5)


@pytest.mark.parametrize("factory", ["Flat", "auto"])
def test_the_same_embeddings_give_the_same_index(tmp_path: Path, factory: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make(tmp_path / name, list(range(300)), factory=factory)
    assert (tmp_path / "one" / INDEX_FILE).read_bytes() == (tmp_path / "two" / INDEX_FILE).read_bytes()


def test_embeddings_are_read_by_position_across_shards(tmp_path: Path) -> None:
    _, embeddings = make(tmp_path, list(range(300)), shard_size=7)
    positions = np.array([299, 0, 6, 7, 13, 14, 14])
    np.testing.assert_array_equal(embeddings.at(positions), np.concatenate(list(embeddings))[positions])


def test_a_file_that_is_not_an_index(tmp_path: Path) -> None:
    _, embeddings = make(tmp_path, list(range(5)))
    (tmp_path / INDEX_FILE).write_bytes(b"nothing of the kind")
    with pytest.raises(BundleAltered, match=r"entity\.faiss is not an index"):
        EntityIndex.read(tmp_path / INDEX_FILE, embeddings, {})


def test_an_invalid_factory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot make factory 'What'") as caught:
        make(tmp_path, list(range(5)), factory="What")
    assert "\n" not in str(caught.value)


def test_shards_of_a_wrong_shape(tmp_path: Path) -> None:
    make(tmp_path, list(range(5)))
    with pytest.raises(BundleAltered, match=r"00000\.npy has shape"):
        EmbeddingShards(tmp_path / "embeddings", DIM + 1)
    (tmp_path / "embeddings/00000.npy").write_bytes(b"x")
    with pytest.raises(BundleAltered, match="is not a NumPy array"):
        EmbeddingShards(tmp_path / "embeddings", DIM)


def test_embeddings_out_of_row_order(tmp_path: Path) -> None:
    with pytest.raises(BundleAltered, match="row order"):
        make(tmp_path, [0, 1, 0])


def test_an_exact_index_file_equals_the_one_that_faiss_writes(tmp_path: Path) -> None:
    _, embeddings = make(tmp_path, list(range(250)))
    theirs = faiss.index_factory(DIM, "Flat", faiss.METRIC_INNER_PRODUCT)
    theirs.add(np.concatenate(list(embeddings)))
    faiss.write_index(theirs, str(tmp_path / "theirs.faiss"))
    assert (tmp_path / INDEX_FILE).read_bytes() == (tmp_path / "theirs.faiss").read_bytes()
