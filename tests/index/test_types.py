"""Ancestors of types, and searches for them, against slow and obvious code."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from core.errors import BundleAltered
from index.bundle import Bundle
from index.compact import compact
from index.delta import Delta
from index.live import LiveSegment
from index.overlay import OverlayView
from index.store import EntityStore, StoredEntity, write_store
from index.types import TypeHierarchy, TypeParents
from tests.conftest import FIXTURE_ENTITIES, add_type_parents

PARENTS: dict[str, list[str]] = {
    "animal": ["organism"],
    "fruit": ["organism", "food"],
    "food": ["thing", "fruit"],  # a cycle
    "flag": ["thing"],
    "bird": ["animal"],
    "organism": ["thing"],
    "thing": ["thing"],
}
WANTED = ("thing", "organism", "food", "animal", "bird", "flag", "monument", "nothing", "\ud800")


def slow_ancestors(types: Collection[str], parents: Mapping[str, Sequence[str]]) -> set[str]:
    found = set(types)
    for _ in range(len(parents) + 1):
        found |= {parent for each in found for parent in parents.get(each, ())}
    return found


def rows(parents: Mapping[str, Sequence[str]]) -> list[TypeParents]:
    return [TypeParents(type=each, parents=tuple(above)) for each, above in parents.items()]


def test_random_graphs_with_cycles() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 5, 30):
        names = [f"t{number}" for number in range(size)]
        parents = {each: rng.choice(names, int(rng.integers(3))).tolist() for each in names[: size // 2 + 1]}
        types = TypeHierarchy(rows(parents))
        for _ in range(40):
            own = tuple(rng.choice([*names, "other"], int(rng.integers(4))).tolist())
            wanted = tuple(rng.choice([*names, "other"], int(rng.integers(1, 3))).tolist())
            above = slow_ancestors(own, parents)
            assert types.ancestors(own) == types.names_above(own) == above
            assert (not types.names_below(wanted).isdisjoint(own)) == (not above.isdisjoint(wanted))


def test_a_type_is_named_by_key_or_label_and_equal_labels_are_kept_apart() -> None:
    types = TypeHierarchy(
        [
            TypeParents(type="Q1", parents=("Q3",), label="bank (Q1)"),
            TypeParents(type="Q2", parents=("Q4",), label="bank (Q2)"),
            TypeParents(type="Q3", parents=(), label="company"),
            TypeParents(type="Q4", parents=("Q5",), label="landform"),
        ]
    )
    assert types.ancestors(("bank (Q1)",)) == types.ancestors(("Q1",)) == {"Q1", "Q3"}
    assert types.ancestors(("bank",)) == {"Q1", "Q2", "Q3", "Q4", "Q5"}
    for wanted in ("company", "Q3", "bank", "bank (Q1)"):
        assert not types.names_below((wanted,)).isdisjoint(["bank (Q1)"])
    for wanted in ("landform", "Q5", "bank (Q2)"):
        assert types.names_below((wanted,)).isdisjoint(["bank (Q1)"])
    assert types.names_above(("bank (Q1)",)) == {"bank (Q1)", "bank", "Q1", "company", "Q3"}
    assert (types.label("Q3"), types.label("Q5"), types.title("Q1")) == ("company", "Q5", "bank")
    assert TypeHierarchy(types.rows()).rows() == types.rows()


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Bundle:
    folder = tmp_path / "typed"
    shutil.copytree(small_bundle, folder)
    add_type_parents(folder, PARENTS)
    return Bundle.open(folder)


@pytest.fixture
def live(bundle: Bundle, tmp_path: Path) -> Iterator[tuple[EntityStore, LiveSegment]]:
    with bundle.store() as store:
        segment = LiveSegment(tmp_path / "live", bundle, store)
        yield store, segment
        segment.close()


def wanted_types() -> Iterator[tuple[str, ...]]:
    yield from itertools.chain(itertools.combinations(WANTED, 1), itertools.combinations(WANTED, 2))


def matching(entities: Collection[StoredEntity], wanted: Collection[str]) -> set[str]:
    return {each.entity_id for each in entities if not slow_ancestors(each.types, PARENTS).isdisjoint(wanted)}


def test_the_store_selects_what_a_loop_does(bundle: Bundle, small_bundle: Path) -> None:
    with bundle.store() as store, Bundle.open(small_bundle).store() as without:
        entities = store.by_rows(range(len(store)))
        for wanted in wanted_types():
            selected = store.by_rows(np.flatnonzero(store.select(wanted).allowed_E).tolist())
            assert {each.entity_id for each in selected} == matching(entities, wanted)
            plain = without.by_rows(np.flatnonzero(without.select(wanted).allowed_E).tolist())
            assert [each.entity_id for each in plain] == [
                each.entity_id for each in FIXTURE_ENTITIES if set(each.types) & set(wanted)
            ]


def search_all(view: OverlayView, wanted: tuple[str, ...]) -> set[str]:
    query_1D = np.ones((1, 16), np.float32)
    rows_1K, _ = view.search(query_1D, 50, selection=view.select(wanted))
    return {each.entity_id for each in view.by_rows(rows_1K[0][rows_1K[0] >= 0].tolist())}


def test_live_entities_are_found_by_ancestors_too_and_keep_them_when_compacted(
    bundle: Bundle, live: tuple[EntityStore, LiveSegment], tmp_path: Path
) -> None:
    store, segment = live
    giraffe = store.get("Q15083")
    put = {
        "Q15083": ("flag",),
        "kingfisher": ("bird",),
        "kiwi": ("bird", "fruit"),
        "stone": (),
        "statue": ("monument",),
    }
    for number, (entity_id, types) in enumerate(put.items()):
        entity = StoredEntity(**{**vars(giraffe), "entity_id": entity_id, "types": types, "has_thumbnail": False})
        segment.put(entity, np.random.default_rng(number).normal(size=16).astype(np.float32), None)
    view = OverlayView(bundle.index(), store, segment)
    delta = view.delta
    assert isinstance(delta, Delta)
    base = [each for each in store.by_rows(range(len(store))) if each.entity_id not in put]
    entities = [*base, *delta.entities.values()]
    for wanted in wanted_types():
        assert search_all(view, wanted) == matching(entities, wanted)
    compacted = compact(bundle.path, tmp_path / "live", tmp_path / "compacted")
    with compacted.store() as compacted_store:
        assert compacted_store.types.rows() == store.types.rows()
        for wanted in wanted_types():
            assert search_all(OverlayView(compacted.index(), compacted_store), wanted) == matching(entities, wanted)


@pytest.mark.parametrize("parents", ["{", "1", None])
def test_malformed_parents_are_refused_when_the_store_is_opened(bundle: Bundle, parents: str | None) -> None:
    path = bundle.path / "entities.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP TABLE type")
        db.execute("CREATE TABLE type (type TEXT, label TEXT, parents TEXT)")
        db.execute("INSERT INTO type VALUES ('bird', '', ?)", (parents,))
    with pytest.raises(BundleAltered, match="export the bundle again"):
        EntityStore(path)


def test_a_store_without_parents_has_no_table_for_them(tmp_path: Path, bundle: Bundle) -> None:
    with bundle.store() as store:
        entities = store.by_rows(range(len(store)))
    for name, types in (("with", rows(PARENTS)), ("without", [])):
        write_store(tmp_path / name, ((each, None) for each in entities), types)
    tables = {}
    for name in ("with", "without"):
        with closing(sqlite3.connect(tmp_path / name)) as db:
            tables[name] = {table for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables["with"] - tables["without"] == {"type"}
