"""Live changes: every process answers as a dict would, also after a crash."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from core.errors import Conflict, LiveDirError, NotFound, Unavailable, UnknownEntity, UserError
from index.bundle import Bundle
from index.delta import Delta, References, new_image_id
from index.embeddings import EmbeddingShards
from index.live import LIVE_FILE, LiveSegment
from index.manifest import REMEMBERED_FOLDER
from index.overlay import OverlayView
from index.search import EntityIndex
from index.store import EntityStore, StoredEntity
from tests.conftest import add_remembered

Vector = npt.NDArray[np.float32]


@dataclass
class Opened:
    """A bundle with live changes."""

    index: EntityIndex
    store: EntityStore
    live: LiveSegment

    @property
    def view(self) -> OverlayView:
        self.live.refresh()
        return OverlayView(self.index, self.store, self.live)

    def close(self) -> None:
        self.live.close()
        self.store.close()


def opened(bundle_path: Path, folder: Path) -> Opened:
    bundle = Bundle.open(bundle_path)
    store = bundle.store()
    return Opened(bundle.index(), store, LiveSegment(folder, bundle, store))


@pytest.fixture
def live_dir(tmp_path: Path) -> Path:
    return tmp_path / "live"


@pytest.fixture
def edited(small_bundle: Path, live_dir: Path) -> Iterator[Opened]:
    opening = opened(small_bundle, live_dir)
    yield opening
    opening.close()


def entity(entity_id: str, title: str = "A thing", **fields: Any) -> StoredEntity:
    return StoredEntity(
        **{
            "row": -1,
            "entity_id": entity_id,
            "title": title,
            "titles": {},
            "description": None,
            "url": None,
            "types": (),
            "symbol": None,
            "image_count": 1,
            "has_text": False,
            **fields,
        }
    )


def vector(seed: int, dim: int = 16) -> Vector:
    drawn = np.random.default_rng([seed, 1]).normal(size=dim).astype(np.float32)
    return (drawn / np.linalg.norm(drawn)).astype(np.float16).astype(np.float32)


def references(seed: int) -> References:
    return References(images_ID=vector(seed)[None].astype(np.float16))


def found_ids(view: OverlayView, query_D: Vector, top_k: int = 3) -> list[str]:
    rows_BK, _ = view.search(query_D[None], top_k)
    return [found.entity_id for found in view.by_rows([int(row) for row in rows_BK[0] if row >= 0])]


def test_an_entity_that_is_put_is_found_by_vector_id_and_title(edited: Opened) -> None:
    giraffe = entity("Q15083", "Okapi", titles={"fr": "Okapi", "de": "Waldgiraffe"}, types=("animal",), symbol="O")
    assert not edited.live.put(giraffe, vector(1), b"webp")
    assert edited.live.put(entity("new", "Lion statue"), vector(2), None)
    view = edited.view
    assert view.entity_count == 13
    assert view.version == "+2"
    assert found_ids(view, vector(1), 1) == ["Q15083"]
    assert view.get("Q15083") == replace(giraffe, row=view.get("Q15083").row, has_thumbnail=True)
    assert not view.get("new").has_thumbnail
    assert view.thumbnail("Q15083") == b"webp"
    assert view.thumbnail("new") is None
    assert [found.title for found in view.search_titles("lion")] == ["Lion", "Lion statue", "Lion of Lucerne"]
    assert [found.title for found in view.search_titles("lion", 2)] == ["Lion", "Lion statue"]
    assert [found.title for found in view.search_titles("waldgir")] == ["Okapi"]
    assert view.search_titles("giraffe") == []  # its title in the bundle
    assert [each.row for each in view.sample(4)] == [3, 7, 11]  # without the row that was replaced


def test_deleted_entities_are_not_found_and_others_fill_their_places(edited: Opened) -> None:
    before = found_ids(edited.view, vector(3), 12)
    for entity_id in before[:6]:
        edited.live.delete(entity_id)
    view = edited.view
    assert found_ids(view, vector(3), 4) == before[6:10]
    assert found_ids(view, vector(3), 12) == before[6:]
    assert view.entity_count == 6
    with pytest.raises(UnknownEntity, match="was deleted"):
        view.get(before[0])
    with pytest.raises(UnknownEntity):
        view.thumbnail(before[0])
    with pytest.raises(UnknownEntity):
        edited.live.delete(before[0])
    with pytest.raises(UnknownEntity):
        edited.live.delete("never there")
    assert edited.live.put(entity(before[0]), vector(4), None)


def test_a_view_does_not_change(edited: Opened) -> None:
    edited.live.put(entity("a"), vector(5), None)
    earlier = edited.view
    edited.live.put(entity("a", "Replaced"), vector(6), None)
    edited.live.delete("Q140")
    assert found_ids(earlier, vector(5), 1) == ["a"]
    assert [found.title for found in earlier.by_rows([int(earlier.search(vector(5)[None], 1)[0][0, 0])])] == ["A thing"]
    assert found_ids(edited.view, vector(6), 1) == ["a"]
    assert (earlier.version, edited.view.version) == ("+1", "+3")


def test_replaced_entities_are_dropped_and_earlier_deltas_do_not_change() -> None:
    put = [(entity(f"old {row}", row=row), references(row)) for row in range(1, 40)]
    latest = earlier = Delta.empty(16, 0).changed(39, put, [], [])
    for row in range(40, 100):
        latest = latest.changed(row, [(entity("changing", f"Version {row}", row=row), references(row))], [], [7])
    assert len(latest.rows_M) == len(latest.vectors_ND) == len(latest.entities) == 40
    assert latest.hidden_H.tolist() == [7]
    for delta, row in ((earlier, 20), (latest, 20), (latest, 99)):
        rows_BK, scores_BK = delta.search(vector(row)[None], 1)
        assert rows_BK.tolist() == [[row]]
        np.testing.assert_allclose(scores_BK, 1, atol=1e-3)
    assert latest.entities[99].title == "Version 99"
    assert earlier.latest["old 20"] == latest.latest["old 20"] == 20
    empty = latest.changed(100, [], [*(found.entity_id for found in latest.entities.values())], [])
    assert len(empty.rows_M) == len(empty.vectors_ND) == len(empty.entities) == 0
    assert set(empty.latest.values()) == {None}
    assert len(earlier.rows_M) == 39


class Model:
    """The simplest correct implementation: a dict."""

    def __init__(self, bundle_path: Path) -> None:
        bundle = Bundle.open(bundle_path)
        embeddings = bundle.embeddings()
        vectors_ND = np.concatenate(list(embeddings)).astype(np.float64)
        with bundle.store() as store:
            stored = store.by_rows(range(len(store)))
        self.entities = {found.entity_id: found for found in stored}
        self.pooling = bundle.manifest.pooling
        self.images: dict[str, dict[str, npt.NDArray[np.float64]]] = {
            found.entity_id: {
                f"base-{number}": vector_D for number, vector_D in enumerate(vectors_ND[embeddings.rows_N == found.row])
            }
            for found in stored
        }
        self.remembered: dict[str, npt.NDArray[np.float64]] = {}
        if (remembered := bundle.manifest.remembered) is not None:
            self.handicap = remembered.handicap
            vectors = EmbeddingShards(bundle_path / REMEMBERED_FOLDER, bundle.manifest.embedding_dim)
            ids = [stored[row].entity_id for row in vectors.rows_N.tolist()]
            self.remembered = dict(zip(ids, vectors.part(0).astype(np.float64), strict=True))

    def put(self, put: StoredEntity, embedding_D: Vector) -> bool:
        created = put.entity_id not in self.entities
        self.remembered.pop(put.entity_id, None)
        self.entities[put.entity_id] = put
        self.images[put.entity_id] = {"own": self._stored(embedding_D)}
        return created

    def add_image(self, entity_id: str, image_id: str, embedding_D: Vector) -> None:
        self.images[entity_id][image_id] = self._stored(embedding_D)

    @staticmethod
    def _stored(embedding_D: Vector) -> npt.NDArray[np.float64]:
        stored_D = (embedding_D / np.linalg.norm(embedding_D)).astype(np.float16).astype(np.float64)
        unit_D: npt.NDArray[np.float64] = stored_D / np.linalg.norm(stored_D)
        return unit_D

    def added(self, entity_id: str) -> list[str]:
        return [each for each in self.images.get(entity_id, {}) if not each.startswith(("base-", "own"))]

    def delete(self, entity_id: str) -> bool:
        self.images.pop(entity_id, None)
        self.remembered.pop(entity_id, None)
        return self.entities.pop(entity_id, None) is not None

    def scores(self, query_D: Vector) -> dict[str, float]:
        scores = {}
        for entity_id, images in self.images.items():
            vectors_VD = np.stack(list(images.values()))
            if self.pooling == "mean":
                vectors_VD = vectors_VD.mean(axis=0)[None]
            cosines_V = vectors_VD @ query_D / np.linalg.norm(vectors_VD, axis=1) / np.linalg.norm(query_D)
            scores[entity_id] = float(cosines_V.max())
        for entity_id, vector_D in self.remembered.items():
            score = float(vector_D @ query_D / np.linalg.norm(query_D)) - self.handicap
            scores[entity_id] = max(score, scores[entity_id])
        return scores


def check_search(
    view: OverlayView, model: Model, query_D: Vector, top_k: int, types: tuple[str, ...], atol: float = 2e-5
) -> None:
    rows_BK, scores_BK = view.search(query_D[None], top_k, selection=view.select(types) if types else None)
    found = view.by_rows([int(row) for row in rows_BK[0] if row >= 0])
    scores = model.scores(query_D)
    allowed = [each for each in scores if not types or set(types) & set(model.entities[each].types)]
    expected = sorted((scores[each] for each in allowed), reverse=True)[:top_k]
    assert len(found) == len(expected)
    assert np.all(rows_BK[0, len(found) :] == -1)
    assert np.all(np.diff(scores_BK[0, : len(found)]) <= 0)
    np.testing.assert_allclose(scores_BK[0, : len(found)], expected, atol=atol)
    for each, score in zip(found, scores_BK[0], strict=False):
        assert each.entity_id in allowed
        assert abs(scores[each.entity_id] - score) < atol
        assert each.title == model.entities[each.entity_id].title
    assert len({each.entity_id for each in found}) == len(found)


@pytest.fixture(params=["nearest", "mean", "remembered"])
def any_bundle(request: pytest.FixtureRequest, small_bundle: Path, pooled_bundle: Path, tmp_path: Path) -> Path:
    """Return a bundle of each way to find an entity."""
    if request.param != "remembered":
        return small_bundle if request.param == "nearest" else pooled_bundle
    base = Path(shutil.copytree(small_bundle, tmp_path / "remembering"))
    add_remembered(base, [0, 1, 2, 4, 6, 8, 10], handicap=0.06)
    return base


def test_thousands_of_random_changes_and_searches_equal_a_dict(any_bundle: Path, live_dir: Path) -> None:
    rng = np.random.default_rng(17)
    model, atol = Model(any_bundle), 5e-4 if any_bundle.name == "pooled" else 2e-5
    known = [*model.entities, *(f"new {number}" for number in range(40)), "unknown"]
    processes = [opened(any_bundle, live_dir) for _ in range(2)]  # like two processes, they share only the file
    kinds = {
        "put": 0.15,
        "delete": 0.13,
        "add": 0.2,
        "remove": 0.15,
        "search": 0.32,
        "compare": 0.045,
        "restart": 0.005,
    }
    done = dict.fromkeys(kinds, 0)
    for number in range(2500):
        which = int(rng.integers(2))
        process = processes[which]
        kind = str(rng.choice(list(kinds), p=list(kinds.values())))
        done[kind] += 1
        entity_id = str(rng.choice(known))
        if kind == "put":
            embedding_D = vector(int(rng.integers(1000)))  # some are equal
            types = tuple(rng.choice(["animal", "fruit", "flag"], int(rng.integers(3)), replace=False).tolist())
            new = entity(entity_id, f"Thing {rng.integers(9)} of n{number}", types=types, image_count=0)
            assert process.live.put(new, embedding_D, None) == model.put(new, embedding_D)
        elif kind == "delete":
            if model.delete(entity_id):
                process.live.delete(entity_id)
            else:
                with pytest.raises(UnknownEntity):
                    process.live.delete(entity_id)
        elif kind == "add":
            embedding_D, image_id = vector(int(rng.integers(1000))), new_image_id()
            if entity_id in model.entities:
                process.live.add_image(entity_id, image_id, embedding_D)
                model.add_image(entity_id, image_id, embedding_D)
            else:
                with pytest.raises(UnknownEntity):
                    process.live.add_image(entity_id, image_id, embedding_D)
        elif kind == "remove":
            images = [(entity_id, image_id) for entity_id in known for image_id in model.added(entity_id)]
            if images:
                entity_id, image_id = images[int(rng.integers(len(images)))]
                process.live.remove_image(entity_id, image_id)
                del model.images[entity_id][image_id]
                with pytest.raises(NotFound):
                    process.live.remove_image(entity_id, image_id)
        elif kind == "search":
            query_D = rng.normal(size=16).astype(np.float32)
            types = ((), (), ("animal",), ("fruit", "brand"), ("none",))[int(rng.integers(5))]
            check_search(process.view, model, query_D, int(rng.choice([1, 3, 10, 80])), types, atol)
        elif kind == "restart":
            process.close()
            processes[which] = opened(any_bundle, live_dir)
        else:
            view = process.view
            assert view.entity_count == len(model.entities)
            for each in known:
                if each in model.entities:
                    assert view.get(each).title == model.entities[each].title
                    assert [*view.image_ids(each)][
                        view.get(each).image_count - len(model.added(each)) :
                    ] == model.added(each)
                else:
                    with pytest.raises(UnknownEntity):
                        view.get(each)
            digit = f"Thing {rng.integers(9)} of"
            expected = {each.entity_id for each in model.entities.values() if each.title.startswith(digit)}
            assert {each.entity_id for each in view.search_titles(digit, 100)} == expected
    assert min(done.values()) > 5
    for process in processes:
        process.close()


def test_removing_what_was_added_restores_every_answer_to_the_digit(any_bundle: Path, live_dir: Path) -> None:
    edited, queries_BD = opened(any_bundle, live_dir), np.stack([vector(seed) for seed in range(30)])
    before, counts = edited.view.search(queries_BD, 12), [each.image_count for each in edited.view.sample(12)]
    added = [(each.entity_id, new_image_id()) for each in edited.view.sample(12) for _ in range(2)]
    for number, (entity_id, image_id) in enumerate(added):
        edited.live.add_image(entity_id, image_id, vector(number))
    view = edited.view
    assert [each.image_count for each in view.sample(12)] == [count + 2 for count in counts]
    assert not np.array_equal(view.search(queries_BD, 12)[1], before[1])
    assert view.get("Q7378").title == "Elephant"
    assert len(view.images_of(view.get("Q7378").row)) == 5
    assert view.thumbnail("Q13191") is not None
    assert [(each.title, each.image_count) for each in view.search_titles("elephant")] == [("Elephant", 5)]
    assert view.entity_count == 12
    np.random.default_rng(0).shuffle(added)
    for entity_id, image_id in added:
        edited.live.remove_image(entity_id, image_id)
    for process in (edited, opened(any_bundle, live_dir)):
        after = process.view.search(queries_BD, 12)
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], before[1])
        assert [each.image_count for each in process.view.sample(12)] == counts
        assert not process.live.delta.entities
        process.close()
    with sqlite3.connect(live_dir / LIVE_FILE) as connection:  # nothing is left of the images
        assert connection.execute("SELECT max(length(vector)) FROM reference WHERE image_id NOT NULL").fetchone() == (
            0,
        )
    connection.close()


def test_images_that_have_to_stay(edited: Opened, small_bundle: Path, live_dir: Path, tmp_path: Path) -> None:
    from index.compact import compact

    edited.live.add_image("Q7378", "added", vector(1))
    assert edited.view.image_ids("Q7378") == ("base-0", "base-1", "base-2", "added")
    edited.live.put(entity("new", image_count=2), np.stack([vector(2), vector(3)]), None, ("one", "two"))
    assert edited.view.image_ids("new") == ("one", "two")
    edited.live.remove_image("new", "one")
    assert (edited.view.image_ids("new"), edited.view.get("new").image_count) == (("two",), 1)
    for entity_id, image_id, error in (
        ("Q7378", "base-2", Conflict), ("Q7378", "base-3", NotFound), ("Q140", "added", NotFound),
        ("new", "one", NotFound), ("new", "two", Conflict), ("nothing", "added", UnknownEntity),
    ):  # fmt: skip
        with pytest.raises(error):
            edited.live.remove_image(entity_id, image_id)
    revision = edited.live.delta.revision
    compact(small_bundle, live_dir, tmp_path / "new")
    after = opened(tmp_path / "new", live_dir)
    assert after.view.image_ids("Q7378") == ("base-0", "base-1", "base-2", "base-3")
    for entity_id, image_id in (("Q7378", "added"), ("Q7378", "base-3"), ("new", "two")):
        with pytest.raises(Conflict):
            after.live.remove_image(entity_id, image_id)
    assert after.live.delta.revision == revision
    after.close()


def test_images_changed_during_and_after_a_compaction_hold_for_both_bundles(
    any_bundle: Path, live_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index import compact

    edited, model = opened(any_bundle, live_dir), Model(any_bundle)
    rng, ids = np.random.default_rng(5), ["Q140", "Q7378", "Q89", "flag:JP", "new", "Q_no_image", "brand:a&b", "other"]

    def change(live: LiveSegment, kind: str, entity_id: str) -> None:
        embedding_D, image_id = vector(int(rng.integers(10**6))), new_image_id()
        if kind == "put":
            assert live.put(entity(entity_id, image_count=0), embedding_D, None) == model.put(
                entity(entity_id, image_count=0), embedding_D
            )
        elif entity_id not in model.entities:
            return
        elif kind == "add":
            live.add_image(entity_id, image_id, embedding_D)
            model.add_image(entity_id, image_id, embedding_D)
        elif kind == "delete":
            live.delete(entity_id)
            model.delete(entity_id)
        else:
            row = live.delta.latest.get(entity_id)
            for removable in () if row is None else live.delta.references[row].image_ids[:1]:
                live.remove_image(entity_id, removable)
                model.images[entity_id].pop(removable)

    def changes(*lives: LiveSegment) -> None:
        for number in range(60):
            kind = str(rng.choice(["add", "remove", "put", "delete"], p=[0.5, 0.35, 0.1, 0.05]))
            change(lives[number % len(lives)], kind, str(rng.choice(ids)))

    build = compact.build_index

    def build_index(*arguments: Any, **options: Any) -> Any:
        changes(edited.live)
        return build(*arguments, **options)

    monkeypatch.setattr(compact, "build_index", build_index)
    changes(edited.live)
    path = any_bundle
    for number in range(3):
        compact.compact(path, live_dir, tmp_path / f"compacted {number}")
        path = tmp_path / f"compacted {number}"
        after = opened(path, live_dir)
        for both in (edited.live, after.live) * 3:
            for query in range(10):
                for process in (edited, after):
                    check_search(process.view, model, vector(10 * number + query), 20, (), atol=1e-3)
            changes(both)
        edited.close()
        edited = after
    for each in model.entities:
        row = edited.view.get(each).row
        assert len(edited.view.images_of(row)) == len(model.images[each])
    edited.close()


def test_a_file_of_version_1_is_read(edited: Opened, small_bundle: Path, live_dir: Path) -> None:
    edited.live.put(entity("with image"), vector(1), None)
    edited.live.put(entity("without image", image_count=0), vector(2), b"webp")
    with sqlite3.connect(live_dir / LIVE_FILE) as connection:
        connection.executescript("""
            CREATE TABLE embedding (row INTEGER PRIMARY KEY, vector BLOB NOT NULL);
            INSERT INTO embedding SELECT generation, vector FROM reference;
            DROP TABLE reference;
            PRAGMA user_version = 1;
        """)
    connection.close()
    after = opened(small_bundle, live_dir)
    assert [found_ids(after.view, vector(seed), 1) for seed in (1, 2)] == [["with image"], ["without image"]]
    assert [len(after.view.image_ids(each)) for each in ("with image", "without image")] == [1, 0]
    after.live.add_image("without image", "added", vector(3))
    assert found_ids(after.view, vector(3), 1) == found_ids(after.view, vector(2), 1) == ["without image"]
    after.close()


def test_another_process_sees_a_change_and_another_bundle_is_refused(
    edited: Opened, small_bundle: Path, live_dir: Path, tmp_path: Path
) -> None:
    other = opened(small_bundle, live_dir)
    assert other.view.version == ""
    edited.live.put(entity("a"), vector(5), None)
    assert other.view.version == "+1"
    other.close()
    changed = tmp_path / "changed"
    shutil.copytree(small_bundle, changed)
    manifest = (changed / "manifest.json").read_text()
    (changed / "manifest.json").write_text(manifest.replace('"name": "small"', '"name": "other"'))
    with pytest.raises(LiveDirError, match="'small'"):
        opened(changed, live_dir)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from index.bundle import Bundle
from index.live import LiveSegment
from index.store import StoredEntity

bundle = Bundle.open(Path(sys.argv[1]))
live = LiveSegment(Path(sys.argv[2]), bundle, bundle.store())
images = set(sys.argv[4:])  # of Q140: a writer that was killed may have added and removed one with its last number
for number in range(int(sys.argv[3]), 10**9):
    fields = dict(titles={}, description=None, url=None, types=(), symbol=None, image_count=0, has_text=False)
    entity = StoredEntity(row=-1, entity_id=f"new {number % 7}", title=f"Version {number}", **fields)
    live.put(entity, np.ones(16, np.float32), None)
    newest, oldest = f"{number:x}", f"{number - 3:x}"
    if newest not in images:
        live.add_image("Q140", newest, np.ones(16, np.float32))
    if oldest in images:
        live.remove_image("Q140", oldest)
    images = (images | {newest}) - {oldest}
    print(number, flush=True)
"""


def test_acknowledged_changes_survive_sigkill(small_bundle: Path, live_dir: Path) -> None:
    last, images = -1, set[int]()
    for acknowledged in (1, 17, 40):
        command = [sys.executable, "-c", WRITER, str(small_bundle), str(live_dir), str(last + 1)]
        command += [f"{number:x}" for number in images]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(acknowledged):
                last = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            last = max([last, *(int(line) for line in writer.stdout.read().split())])
        after = opened(small_bundle, live_dir)
        titles = {f"new {number % 7}": f"Version {number}" for number in range(last + 1)}
        unacknowledged = f"new {(last + 1) % 7}"  # perhaps written but not acknowledged
        for entity_id, title in titles.items():
            possible = {title, f"Version {last + 1}"} if entity_id == unacknowledged else {title}
            assert after.view.get(entity_id).title in possible
        assert int(after.view.version.removeprefix("+")) - after.live.base_revision >= last + 1
        images = {int(each, 16) for each in after.view.image_ids("Q140")[1:]}
        acknowledged_images = set(range(max(0, last - 2), last + 1))
        # The next one may have been added, and then the oldest removed.
        assert images >= acknowledged_images - {last - 2}
        assert images <= acknowledged_images | {last + 1}
        assert last - 2 in images or last + 1 in images or last < 2
        after.close()
        with sqlite3.connect(live_dir / LIVE_FILE) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()


def test_compacting_includes_all_changes_and_loses_none_made_during_it(
    edited: Opened, small_bundle: Path, live_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from index import compact

    for number, entity_id in enumerate(["Q15083", "new a", "new b", "new c"]):
        edited.live.put(entity(entity_id, f"Put {number}"), vector(number), b"webp" if number == 1 else None)
    for entity_id in ("Q140", "Q7378", "new b"):
        edited.live.delete(entity_id)
    build = compact.build_index

    def build_index(*arguments: Any, **options: Any) -> Any:
        edited.live.put(entity("meanwhile"), vector(20), None)
        edited.live.delete("new c")
        edited.live.put(entity("Q140", "Back again"), vector(21), None)
        return build(*arguments, **options)

    monkeypatch.setattr(compact, "build_index", build_index)
    made = compact.compact(small_bundle, live_dir, tmp_path / "new")
    assert Bundle.open(tmp_path / "new", "full").manifest.counts.entities == 12
    assert made.unlisted_files() == []
    after = opened(tmp_path / "new", live_dir)
    for number in range(30):  # the old bundle with all changes, the new one with the later ones
        query_D = vector(100 + number)
        rows, scores = edited.view.search(query_D[None], 12)
        new_rows, new_scores = after.view.search(query_D[None], 12)
        np.testing.assert_allclose(new_scores, scores, atol=1e-6)
        titles = [found.title for found in edited.view.by_rows([int(row) for row in rows[0] if row >= 0])]
        assert titles == [found.title for found in after.view.by_rows([int(row) for row in new_rows[0] if row >= 0])]
    assert after.view.entity_count == edited.view.entity_count == 13
    assert after.view.thumbnail("new a") == b"webp"
    assert after.view.thumbnail("Q13191") == edited.store.thumbnail("Q13191") is not None
    assert {found.title for found in after.view.search_titles("put")} == {"Put 0", "Put 1"}
    after.live.put(entity("new a", "Put again"), vector(22), None)
    assert edited.view.get("new a").title == "Put again"
    # The next compaction deletes what only the first bundle needed. Its service must report that.
    monkeypatch.undo()
    compact.compact(tmp_path / "new", live_dir, tmp_path / "newer")
    newest = opened(tmp_path / "newer", live_dir)
    assert newest.view.entity_count == 13
    assert newest.view.get("new a").title == after.view.get("new a").title == "Put again"
    with pytest.raises(LiveDirError, match="belong to bundle"):
        edited.live.refresh()
    with pytest.raises(LiveDirError):
        edited.live.put(entity("late"), vector(23), None)
    after.close()
    newest.close()


def test_a_pooled_bundle_is_searched_edited_and_compacted_like_a_dict(
    pooled_bundle: Path, live_dir: Path, tmp_path: Path
) -> None:
    from index.compact import compact

    model, edited = Model(pooled_bundle), opened(pooled_bundle, live_dir)
    assert edited.index.entity_count == len(edited.index) == 12
    for number, entity_id in enumerate(("Q140", "new a", "new b", "Q15083")):
        put = entity(entity_id, types=("animal",))
        assert edited.live.put(put, vector(number), None) == model.put(put, vector(number))
    for entity_id in ("new b", "Q89"):
        edited.live.delete(entity_id)
        model.delete(entity_id)
    compacted = compact(pooled_bundle, live_dir, tmp_path / "new")
    assert (compacted.manifest.pooling, compacted.manifest.schema_version) == ("mean", 2)
    after = opened(tmp_path / "new", live_dir)
    for number in range(20):
        for view in (edited.view, after.view):
            check_search(view, model, vector(200 + number), 5, ("animal",) if number % 2 else (), atol=5e-4)
            assert len(view.images_of(view.get("Q7378").row)) == 3
    edited.close()
    after.close()


def test_a_bundle_with_remembered_vectors_is_searched_edited_and_compacted_like_a_dict(
    small_bundle: Path, live_dir: Path, tmp_path: Path
) -> None:
    from index.compact import compact

    base = Path(shutil.copytree(small_bundle, tmp_path / "base"))
    add_remembered(base, [0, 1, 2, 4, 6, 8, 10], handicap=0.06)
    model, edited = Model(base), opened(base, live_dir)
    for number, entity_id in enumerate(("Q140", "new", "Q15083")):
        put = entity(entity_id, types=("animal",))
        assert edited.live.put(put, vector(number), None) == model.put(put, vector(number))
    for entity_id in ("Q89", "Q503"):  # row 4 is remembered, row 5 is not
        edited.live.delete(entity_id)
        model.delete(entity_id)
    compacted = compact(base, live_dir, tmp_path / "new")
    entry = Bundle.open(compacted.path, "full").manifest.remembered
    assert entry is not None
    assert entry.entities == len(model.remembered) == 4
    after, raised = opened(tmp_path / "new", live_dir), 0
    for number in range(40):
        query_D = vector(300 + number)
        for view in (edited.view, after.view):
            check_search(view, model, query_D, (1, 5, 20)[number % 3], ("animal",) if number % 2 else (), atol=5e-4)
        scores, remembered, model.remembered = model.scores(query_D), model.remembered, {}
        raised += scores != model.scores(query_D)
        model.remembered = remembered
    assert raised > 20
    for entity_id in tuple(model.remembered):
        after.live.delete(entity_id)
    assert compact(tmp_path / "new", live_dir, tmp_path / "newer").manifest.remembered is None
    edited.close()
    after.close()


def test_compacting_keeps_attended_words(small_bundle: Path, live_dir: Path, tmp_path: Path) -> None:
    from index.bundle import list_files
    from index.compact import compact

    base = Path(shutil.copytree(small_bundle, tmp_path / "base"))
    with sqlite3.connect(base / "entities.sqlite") as connection:
        connection.execute("INSERT INTO heard VALUES (3, '[[0, 4, 0.5]]')")
    connection.close()
    manifest = Bundle.open(small_bundle).manifest.model_copy(update={"files": list_files(base)})
    manifest.write(base / "manifest.json")
    changed = opened(base, live_dir)
    row_3 = changed.store.by_rows([3])[0].entity_id
    changed.live.delete(changed.store.by_rows([0])[0].entity_id)
    changed.close()
    with compact(base, live_dir, tmp_path / "new").store() as store:
        assert store.attended_words(store.get(row_3).row) == ((0, 4, 0.5),)


def test_compacting_nothing_or_to_an_existing_folder_is_refused(
    edited: Opened, small_bundle: Path, live_dir: Path
) -> None:
    from index.compact import compact

    with pytest.raises(UserError, match="no changes"):
        compact(small_bundle, live_dir, live_dir / "new")
    edited.live.delete("Q140")
    with pytest.raises(UserError, match="exists already"):
        compact(small_bundle, live_dir, live_dir)


def test_changes_survive_a_new_index(edited: Opened, small_bundle: Path, live_dir: Path, tmp_path: Path) -> None:
    from index.build import build_index

    edited.live.put(entity("a"), vector(5), None)
    indexed = tmp_path / "indexed"
    shutil.copytree(small_bundle, indexed)
    build_index(indexed, Bundle.open(indexed).embeddings(), factory="HNSW8")
    again = opened(indexed, live_dir)
    assert found_ids(again.view, vector(5), 1) == ["a"]
    again.close()


def test_an_unusable_folder_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LiveDirError, match="cannot be used"):
        opened(small_bundle, tmp_path / "file")
    (tmp_path / LIVE_FILE).write_text("no database, and long enough to be looked at as one")
    with pytest.raises(LiveDirError, match="cannot be used"):
        opened(small_bundle, tmp_path)
    newer = tmp_path / "newer"
    newer.mkdir()
    with sqlite3.connect(newer / LIVE_FILE) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LiveDirError, match="schema version 99"):
        opened(small_bundle, newer)


def test_a_hanging_writer_makes_changes_unavailable_but_not_incomplete(edited: Opened, live_dir: Path) -> None:
    edited.live._writer.execute("PRAGMA busy_timeout = 20")
    hanging = sqlite3.connect(live_dir / LIVE_FILE, isolation_level=None)
    hanging.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="try again"):
        edited.live.put(entity("a"), vector(5), None)
    hanging.execute("ROLLBACK")
    hanging.close()
    assert edited.live.put(entity("a"), vector(5), None)
    assert edited.view.version == "+1"
