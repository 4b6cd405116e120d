"""A bundle in embedded Milvus: the results of faiss, and changes by several hosts at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from milvus_lite.server_manager import server_manager_instance

from core.errors import BadParameter, BundleError, Conflict, NotFound, Unavailable, UnknownEntity, UserError
from index import milvus_view
from index.build import build_index
from index.bundle import Bundle, list_files, open_embeddings
from index.delta import new_image_id
from index.embeddings import EmbeddingShards, write_shard
from index.manifest import MANIFEST_FILE, Counts, Manifest
from index.milvus import Collection, connect
from index.milvus_view import MilvusEntities
from index.store import Selection, StoredEntity, write_store
from tests.commands import run_wikiclip
from tests.conftest import add_remembered, add_type_parents, pool_by_mean, write_small_bundle

Vector = npt.NDArray[np.float32]
DIM = 16
ENTITIES = 400


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return an embedded Milvus. All clients of this process share it, as hosts share a cluster."""
    path = str(tmp_path_factory.mktemp("milvus") / "milvus.db")
    yield path
    server_manager_instance.release_server(path)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of 400 entities, every third with four images."""
    folder = tmp_path_factory.mktemp("bundles") / "many"
    write_small_bundle(folder)
    shutil.rmtree(folder / "embeddings")
    (folder / "embeddings").mkdir()
    rows_N = np.repeat(np.arange(ENTITIES), np.where(np.arange(ENTITIES) % 3 == 0, 4, 1))
    for shard, rows_n in enumerate(np.array_split(rows_N, 3)):
        write_shard(folder / "embeddings", shard, rows_n, vectors(len(rows_n), seed=shard))
    write_store(folder / "entities.sqlite", ((entity(f"Q{row}", row=row), None) for row in range(ENTITIES)))
    counts = Counts(entities=ENTITIES, embeddings=len(rows_N), without_image=0, without_text=0, rejected=0)
    changed = {"counts": counts, "files": list_files(folder)}
    manifest = Manifest.read(folder / MANIFEST_FILE).model_copy(update=changed)
    manifest.write(folder / MANIFEST_FILE)
    build_index(folder, open_embeddings(folder, manifest))
    return Bundle.open(folder)


def vectors(count: int, seed: int) -> Vector:
    drawn = np.random.default_rng([seed, 7]).normal(size=(count, DIM)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def entity(entity_id: str, title: str = "A thing", **fields: Any) -> StoredEntity:
    row = int(fields.get("row", -1))
    kinds = ("even" if row % 2 == 0 else "odd", *(("rare",) if row in (7, 33) else ()))
    return StoredEntity(
        **{
            "row": -1, "entity_id": entity_id, "title": f"{title} {row}" if row >= 0 else title, "titles": {},
            "description": None, "url": None, "types": kinds, "symbol": None, "image_count": 1, "has_text": False,
            **fields,
        }
    )  # fmt: skip


def load_into(uri: str, opened: Bundle) -> None:
    client = connect(uri)
    Collection(client, opened).load("Flat")
    client.close()


@pytest.fixture(scope="module")
def loaded(uri: str, bundle: Bundle) -> str:
    client = connect(uri)
    assert Collection(client, bundle).load() == bundle.manifest.counts.embeddings
    client.close()
    return uri


@pytest.fixture
def entities(loaded: str, bundle: Bundle) -> Iterator[MilvusEntities]:
    with bundle.store() as store:
        opened = MilvusEntities(loaded, bundle, store)
        yield opened
        opened.close()


@pytest.mark.parametrize("types", [(), ("odd",), ("rare",), ("rare", "even"), ("nothing",)])
@pytest.mark.parametrize("top_k", [1, 10, 250])
def test_results_equal_those_of_faiss(
    entities: MilvusEntities, bundle: Bundle, types: tuple[str, ...], top_k: int
) -> None:
    queries_BD = 3 * vectors(20, seed=50)  # their length does not matter
    with bundle.store() as store:
        faiss_rows, faiss_scores = bundle.index().search(
            queries_BD, top_k, selection=store.select(types) if types else None
        )
    rows_BK, scores_BK = entities.search(queries_BD, top_k, selection=entities.select(types) if types else None)
    np.testing.assert_allclose(scores_BK, faiss_scores, atol=2e-3)  # a missed near tie costs no more
    np.testing.assert_array_equal(np.sum(rows_BK >= 0, axis=1), np.sum(faiss_rows >= 0, axis=1))
    found = [len(np.intersect1d(*pair)) / len(np.unique(pair[1])) for pair in zip(rows_BK, faiss_rows, strict=True)]
    assert np.mean(found) > 0.97
    assert np.all(np.diff(scores_BK, axis=1)[rows_BK[:, 1:] >= 0] <= 0)
    assert all(len(set(rows)) == len(rows) for rows in (row_K[row_K >= 0].tolist() for row_K in rows_BK))


def test_types_are_found_by_their_ancestors(
    uri: str, bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "typed"
    shutil.copytree(bundle.path, folder)
    add_type_parents(folder, {"odd": ["number"], "rare": ["find"], "even": ["number"], "find": ["thing", "rare"]})
    typed = Bundle.open(folder)
    client = connect(uri)
    Collection(client, typed).load()
    (new_D,) = vectors(1, seed=61)
    queries_BD = np.concatenate([vectors(10, seed=52), new_D[None]])
    with typed.store() as store:
        entities = MilvusEntities(uri, typed, store)
        for types in (("number",), ("find",), ("thing",), ("odd", "thing"), ("nothing",)):
            expected = typed.index().search(queries_BD, 10, selection=store.select(types))
            found = entities.search(queries_BD, 10, selection=entities.select(types))
            np.testing.assert_array_equal(np.sum(found[0] >= 0, axis=1), np.sum(expected[0] >= 0, axis=1))
            np.testing.assert_allclose(found[1], expected[1], atol=2e-3)
        entities.put(entity("new", types=("find",)), new_D, None)
        for kind, found_new in (("thing", True), ("rare", True), ("number", False)):
            _, scores_BK = entities.search(new_D[None], 1, selection=entities.select((kind,)))
            assert (scores_BK[0, 0] > 0.99) == found_new
        entities.close()
        assert not caplog.records
        client.delete(Collection(client, typed).counters, ids=["ancestors"])  # as a version without ancestors leaves it
        MilvusEntities(uri, typed, store).close()
        assert [each.getMessage() for each in caplog.records] == [
            f"collection {Collection(client, typed).name} was loaded by an older version: `types` finds no ancestors; "
            "drop it and load it again"
        ]
    client.close()


def test_scores_are_cosines_of_the_best_image(entities: MilvusEntities, bundle: Bundle) -> None:
    queries_BD = vectors(5, seed=51)
    rows_BK, scores_BK = entities.search(queries_BD, 10)
    for query_D, rows, scores in zip(queries_BD, rows_BK.tolist(), scores_BK, strict=True):
        np.testing.assert_allclose(
            [float(np.max(entities.images_of(row) @ query_D)) for row in rows], scores, atol=1e-5
        )
    assert len(entities.images_of(3)) == 4
    np.testing.assert_allclose(
        np.sort(entities.images_of(3), axis=0), np.sort(bundle.index().images_of(3), axis=0), atol=1e-6
    )


def test_a_pooled_bundle_has_the_results_of_faiss(uri: str, bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "pooled")
    pool_by_mean(tmp_path / "pooled")
    pooled, client = Bundle.open(tmp_path / "pooled"), connect(uri)
    assert Collection(client, pooled).load("Flat") == ENTITIES < pooled.manifest.counts.embeddings
    counts = pooled.manifest.counts.model_copy(update={"entities": ENTITIES + 1})
    lacking = replace(pooled, manifest=pooled.manifest.model_copy(update={"counts": counts, "name": "lacking"}))
    with pytest.raises(UserError, match="1 entities have no image"):
        Collection(client, lacking).load()
    client.close()
    queries_BD = vectors(20, seed=52)
    with pooled.store() as store:
        entities = MilvusEntities(uri, pooled, store)
        for found, expected in zip(entities.search(queries_BD, 10), pooled.index().search(queries_BD, 10), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(entities.images_of(3), bundle.index().images_of(3))
        entities.put(entity("Q3"), vectors(1, seed=53)[0], None)
        assert len(entities.images_of(entities.get("Q3").row)) == 1
        entities.close()


def test_records_titles_and_unknown_entities(entities: MilvusEntities) -> None:
    assert [each.row for each in entities.by_rows([5, 3])] == [5, 3]
    assert entities.get("Q17").title == "A thing 17"
    assert [each.entity_id for each in entities.search_titles("thing 17")][:1] == ["Q17"]
    assert entities.search_titles("  ") == []
    assert entities.search_titles('"; drop') == []
    assert [each.row for each in entities.sample(2)] == [0, ENTITIES - 1]
    assert (entities.entity_count, entities.version) == (ENTITIES, "")
    for ask in (entities.get, entities.thumbnail):
        with pytest.raises(UnknownEntity):
            ask('" or pk >= 0 or "')


class TestChanges:
    """Each test has its own Milvus and two hosts."""

    @pytest.fixture
    def hosts(self, small_bundle: Path, tmp_path: Path) -> Iterator[tuple[MilvusEntities, MilvusEntities]]:
        opened, path = Bundle.open(small_bundle), str(tmp_path / "own.db")
        load_into(path, opened)
        with opened.store() as store:
            hosts = MilvusEntities(path, opened, store), MilvusEntities(path, opened, store)
            yield hosts
            for host in hosts:
                host.close()
        server_manager_instance.release_server(path)

    def test_a_host_finds_what_another_puts(self, hosts: tuple[MilvusEntities, MilvusEntities]) -> None:
        one, other = hosts
        (new_D,) = vectors(1, seed=60)
        okapi = entity("Q15083", "Okapi", titles={"de": "Waldgiraffe"}, types=("animal", 'a"b'))
        before = other.revision
        assert not one.put(okapi, 5 * new_D, b"webp")
        assert one.put(entity("new", "Żółw", types=("animal",)), -new_D, None)
        other.refresh()
        assert other.revision == before + 2
        assert (other.version, other.entity_count) == ("+2", 13)
        rows_BK, scores_BK = other.search(new_D[None], 3, selection=other.select(('a"b', "nothing")))
        assert (rows_BK >= 0).tolist() == [[True, False, False]]
        assert scores_BK[0, 0] == pytest.approx(1, abs=1e-5)
        (found,) = other.by_rows(rows_BK[0, :1].tolist())
        assert found == replace(okapi, row=found.row, has_thumbnail=True) == other.get("Q15083")
        assert not other.get("new").has_thumbnail
        assert (other.thumbnail("Q15083"), other.thumbnail("new")) == (b"webp", None)
        assert other.attended_words(found.row) == ()
        assert [each.title for each in other.search_titles("waldgir")] == ["Okapi"]
        assert [each.title for each in other.search_titles("zołw")] == ["Żółw"]
        assert [each.title for each in other.search_titles("zolw")] == []  # ł is not an accented l
        assert [each.title for each in other.search_titles("żó")] == ["Żółw"]
        assert other.search_titles("giraffe") == []  # its title in the bundle

    def test_deleted_entities_are_not_found_and_others_fill_their_places(
        self, hosts: tuple[MilvusEntities, MilvusEntities]
    ) -> None:
        one, other = hosts
        query_D = vectors(1, seed=61)
        before = [each.entity_id for each in other.by_rows(other.search(query_D, 12)[0][0].tolist())]
        for number, entity_id in enumerate(before[:6]):
            (one, other)[number % 2].delete(entity_id)
        assert one.refresh() == other.refresh()
        rows_BK, _ = one.search(query_D, 12)
        assert [each.entity_id for each in one.by_rows(rows_BK[0, :6].tolist())] == before[6:]
        assert rows_BK[0, 6:].tolist() == [-1] * 6
        assert (one.version, one.entity_count) == ("+6", 6)
        for missing in (before[0], "never there"):
            with pytest.raises(UnknownEntity):
                one.get(missing)
            with pytest.raises(UnknownEntity):
                one.delete(missing)
        assert one.put(entity(before[0]), query_D[0], None)

    @pytest.mark.parametrize("kind", ["nearest", "mean"])
    def test_random_changes_of_two_hosts_equal_those_of_a_dict(
        self, small_bundle: Path, pooled_bundle: Path, tmp_path: Path, kind: str
    ) -> None:
        opened, uri = Bundle.open(pooled_bundle if kind == "mean" else small_bundle), str(tmp_path / "own.db")
        load_into(uri, opened)
        rng = np.random.default_rng(3)
        base, rows_N = np.concatenate(list(opened.embeddings())), opened.embeddings().rows_N
        with opened.store() as store:
            hosts = MilvusEntities(uri, opened, store), MilvusEntities(uri, opened, store)
            model: dict[str, dict[str, Vector]] = {
                each.entity_id: dict(enumerate_base(base[rows_N == each.row]))
                for each in store.by_rows(range(len(store)))
            }
            names = [*sorted(model), *(f"new {number}" for number in range(6))]
            for step in range(90):
                host, name = hosts[step % 2], str(rng.choice(names))
                added = [(each, key) for each, images in model.items() for key in images if not key.startswith("base-")]
                (embedding_D,) = vectors(1, seed=100 + step)
                chosen = rng.choice(["put", "images", "delete", "add", "remove"], p=[0.15, 0.1, 0.15, 0.35, 0.25])
                if chosen == "put":
                    assert host.put(entity(name, image_count=0), embedding_D, None) == (name not in model)
                    model[name] = {"base-own": embedding_D}
                elif chosen == "images":
                    ids, images_ID = (new_image_id(), new_image_id()), vectors(2, seed=900 + step)
                    assert host.put(entity(name, image_count=2), images_ID, None, ids) == (name not in model)
                    model[name] = dict(zip(ids, images_ID, strict=True))
                elif chosen == "delete" and name in model:
                    host.delete(name)
                    del model[name]
                elif chosen == "add" and name in model:
                    image_id = new_image_id()
                    host.add_image(name, image_id, embedding_D)
                    model[name][image_id] = embedding_D
                elif chosen == "remove" and added:
                    name, image_id = added[int(rng.integers(len(added)))]
                    if len(model[name]) > 1:
                        host.remove_image(name, image_id)
                        del model[name][image_id]
                    else:
                        with pytest.raises(Conflict, match="only image"):
                            host.remove_image(name, image_id)
                if step % 3 == 2:
                    check(hosts, model, vectors(1, seed=200 + step), kind)
            for name, images in model.items():
                ids = {image_id for image_id in images if not image_id.startswith("base-")}
                assert {each for each in hosts[0].image_ids(name) if not each.startswith("base-")} == ids
                found_ID = hosts[1].images_of(hosts[1].get(name).row)
                cosines = found_ID @ np.stack(list(images.values())).T  # each is one of the others, in any order
                np.testing.assert_allclose([cosines.max(axis=0).min(), cosines.max(axis=1).min()], 1, atol=1e-3)
            for host in hosts:
                host.close()
        server_manager_instance.release_server(uri)

    @pytest.mark.parametrize("kind", ["nearest", "mean"])
    def test_removing_what_was_added_restores_every_answer(
        self, small_bundle: Path, pooled_bundle: Path, tmp_path: Path, kind: str
    ) -> None:
        opened, uri = Bundle.open(pooled_bundle if kind == "mean" else small_bundle), str(tmp_path / "own.db")
        load_into(uri, opened)
        with opened.store() as store:
            host, queries_BD = MilvusEntities(uri, opened, store), vectors(20, seed=501)
            host.put(entity("put", image_count=0), queries_BD[1], None)
            before = host.search(queries_BD, 13)
            added = [(name, new_image_id()) for name in ("Q140", "Q7378", "put") for _ in range(2)]
            for number, (name, image_id) in enumerate(added):
                host.add_image(name, image_id, queries_BD[number])
            assert host.get("Q7378").image_count == 5
            assert host.image_ids("Q7378")[:3] == ("base-0", "base-1", "base-2")
            assert set(host.image_ids("Q7378")[3:]) == {each for name, each in added if name == "Q7378"}
            assert not np.array_equal(host.search(queries_BD, 13)[1], before[1])
            assert [each.title for each in host.search_titles("elephant")] == ["Elephant"]
            for image_id, error in (("base-1", Conflict), ("base-3", NotFound), (new_image_id(), NotFound)):
                with pytest.raises(error):
                    host.remove_image("Q7378", image_id)
            with pytest.raises(UnknownEntity):
                host.add_image("nothing", new_image_id(), queries_BD[0])
            for name, image_id in added:
                host.remove_image(name, image_id)
            after = host.search(queries_BD, 13)
            np.testing.assert_array_equal(after[0], before[0])
            np.testing.assert_allclose(after[1], before[1], rtol=0, atol=3e-7)  # Milvus adds up in another order
            assert host.entity_count == 13
            host.close()
        server_manager_instance.release_server(uri)

    def test_remembered_vectors_of_deleted_and_replaced_entities_are_not_found(
        self, bundle: Bundle, tmp_path: Path
    ) -> None:
        path, uri = tmp_path / "remembering", str(tmp_path / "own.db")
        shutil.copytree(bundle.path, path)
        add_remembered(path, range(0, ENTITIES, 3), handicap=0.02)
        opened = Bundle.open(path)
        load_into(uri, opened)
        queries_BD = EmbeddingShards(path / "remembered", DIM).part(0)[:12]  # of rows 0, 3, ... 33
        with opened.store() as store:
            one, other = MilvusEntities(uri, opened, store), MilvusEntities(uri, opened, store)
            for kinds in ((), ("odd",), ("rare", "nothing")):
                selection = store.select(kinds) if kinds else None
                expected = opened.index().search(queries_BD, 20, selection=selection)
                found = one.search(queries_BD, 20, selection=one.select(kinds) if kinds else None)
                np.testing.assert_allclose(found[1], expected[1], atol=1e-5)
                np.testing.assert_array_equal(found[0], expected[0])
            other.delete("Q3")
            other.put(entity("Q6"), -queries_BD[2], None)
            one.refresh()
            gone = np.isin(np.arange(ENTITIES), (3, 6))
            expected_rows, expected_scores = opened.index().search(queries_BD, 5, selection=Selection((), ~gone))
            for _ in range(2):
                rows_BK, scores_BK = one.search(queries_BD, 5)
                assert not np.isin(rows_BK, (3, 6)).any()
                np.testing.assert_allclose(scores_BK, expected_scores, atol=1e-5)
                np.testing.assert_array_equal(rows_BK, expected_rows)
            one.close()
            other.close()
        server_manager_instance.release_server(uri)

    def test_a_record_that_is_too_large_is_refused(self, hosts: tuple[MilvusEntities, MilvusEntities]) -> None:
        with pytest.raises(BadParameter, match="65535"):
            hosts[0].put(entity("long", text="x" * 70_000), vectors(1, seed=62)[0], None)
        hosts[0].refresh()
        assert hosts[0].revision == 0

    def test_an_entity_that_is_found_by_an_image_has_its_current_record(
        self, hosts: tuple[MilvusEntities, MilvusEntities], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(milvus_view, "_SPARE", 0)  # the image is a hit, the row with the record is none
        one, other = hosts
        (image_D,) = vectors(1, seed=64)
        for title in ("First", "Second"):
            one.put(entity("changing", title, image_count=0), -image_D, None)
            one.add_image("changing", new_image_id(), image_D)
            other.refresh()
            (row,) = other.search(image_D[None], 1)[0][0].tolist()
            assert [each.title for each in other.by_rows([row])] == [title]

    def test_records_dropped_from_the_cache_are_read_again(
        self, hosts: tuple[MilvusEntities, MilvusEntities], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(milvus_view, "_CACHED_RECORDS", 1)
        first_D, second_D = vectors(2, seed=63)
        hosts[0].put(entity("first", "First"), first_D, None)
        hosts[0].put(entity("second", "Second"), second_D, None)
        rows = [int(hosts[1].search(each[None], 1)[0][0, 0]) for each in (first_D, second_D)]
        assert [each.title for each in hosts[1].by_rows(rows)] == ["First", "Second"]


def enumerate_base(images_ID: Vector) -> Iterator[tuple[str, Vector]]:
    return ((f"base-{number}", embedding_D) for number, embedding_D in enumerate(images_ID))


def check(hosts: Sequence[MilvusEntities], model: dict[str, dict[str, Vector]], query_D: Vector, kind: str) -> None:
    """Compare the answers of both hosts with a dict of entities and their images."""
    scores = {}
    for key, images in model.items():
        images_ID = np.stack(list(images.values()))
        if kind == "mean":
            images_ID = images_ID.mean(axis=0, keepdims=True) / np.linalg.norm(images_ID.mean(axis=0))
        scores[key] = float((images_ID @ query_D[0]).max())
    expected = sorted(((score, key) for key, score in scores.items()), reverse=True)[:5]
    for host in hosts:
        host.refresh()
        rows_BK, scores_BK = host.search(query_D, 5)
        found = host.by_rows(rows_BK[0][rows_BK[0] >= 0].tolist())
        assert [each.entity_id for each in found] == [key for _, key in expected]
        np.testing.assert_allclose(scores_BK[0, : len(found)], [score for score, _ in expected], atol=5e-4)
        assert host.entity_count == len(model)


class TestLoading:
    def test_loading_twice_is_refused(self, loaded: str, bundle: Bundle) -> None:
        client = connect(loaded)
        with pytest.raises(UserError, match="holds this bundle already"):
            Collection(client, bundle).load()
        client.close()

    def test_an_interrupted_load_is_not_served_and_can_be_repeated(
        self, uri: str, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Bundle.open(small_bundle)
        client = connect(uri)
        with monkeypatch.context() as patched:
            patched.setattr(Collection, "_insert_all", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                Collection(client, opened).load()
        with opened.store() as store:
            with pytest.raises(BundleError, match="wikiclip index --backend milvus"):
                MilvusEntities(uri, opened, store)
            Collection(client, opened).load("IVF4,Flat")
            entities = MilvusEntities(uri, opened, store)
            rows_BK, _ = entities.search(vectors(1, seed=70), 12)
            assert sorted(rows_BK[0].tolist()) == list(range(12))
            entities.close()
        client.close()

    @pytest.mark.parametrize("factory", ["SQfp16", "IVF16,PQ8", "HNSW32,SQ8"])
    def test_an_index_without_true_cosines_is_refused(self, uri: str, bundle: Bundle, factory: str) -> None:
        client = connect(uri)
        with pytest.raises(UserError, match="true cosines"):
            Collection(client, bundle).load(factory)
        client.close()

    def test_an_unreachable_server(self) -> None:
        with pytest.raises(UserError, match=r"Milvus at http://127\.0\.0\.1:1 cannot be reached") as caught:
            connect("http://someone:secret@127.0.0.1:1")
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("address", ["localhost:19530", "ftp://host", "data", ""])
    def test_an_invalid_uri(self, address: str) -> None:
        with pytest.raises(UserError, match="a Milvus URI is"):
            connect(address)


def test_a_milvus_that_stops_answering_is_unavailable(bundle: Bundle, tmp_path: Path) -> None:
    path = str(tmp_path / "gone.db")
    client = connect(path)
    Collection(client, bundle).load("Flat")
    with bundle.store() as store:
        entities = MilvusEntities(path, bundle, store)
        client.drop_collection(Collection(client, bundle).name)
        with pytest.raises(Unavailable, match="Milvus does not answer"):
            entities.search(vectors(1, seed=80), 1)
        entities.close()
    client.close()
    server_manager_instance.release_server(path)


def test_the_command_loads_a_bundle_once(small_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cli.db"
    arguments = ("index", "--bundle", small_bundle, "--backend", "milvus", "--uri", path, "--json")
    first, second = (run_wikiclip(*arguments) for _ in range(2))
    server_manager_instance.release_server(str(path))
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["embeddings"] == len(Bundle.open(small_bundle).embeddings())
    assert second.returncode == 2
    assert "holds this bundle already" in second.stderr.splitlines()[-1]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
