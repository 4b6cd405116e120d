"""The entity store finds by id, row and title, from any thread, and equal entities give equal bytes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.errors import BundleAltered, BundleIncomplete, UnknownEntity
from index.bundle import Bundle
from index.store import EntityStore, StoredEntity, write_store


@pytest.fixture
def store(small_bundle: Path) -> Iterator[EntityStore]:
    with Bundle.open(small_bundle).store() as store:
        yield store


def entity(row: int, title: str, *, text: str | None = None) -> StoredEntity:
    return StoredEntity(
        row=row,
        entity_id=f"Q{row}",
        title=title,
        titles={},
        description=None,
        url=None,
        types=(),
        symbol=None,
        image_count=0,
        has_text=text is not None,
        text=text,
    )


def titles(store: EntityStore, query: str, limit: int = 20) -> list[str]:
    return [found.title for found in store.search_titles(query, limit)]


def test_entities_survive_the_store(tmp_path: Path) -> None:
    first = StoredEntity(
        row=0,
        entity_id="Q35517",
        title="Élan “vital” 🦌",
        titles={"fr": "Élan", "zh": "驼鹿"},
        description="a deer",
        url="https://en.wikipedia.org/wiki/Moose",
        types=("animal", "deer"),
        symbol="🫎",
        image_count=2,
        has_text=True,
        text="long\ntext",
    )
    second = entity(1, "Plain")
    write_store(tmp_path / "s.sqlite", [(first, b"webp bytes"), (second, None)])
    with EntityStore(tmp_path / "s.sqlite") as store:
        assert len(store) == 2
        pictured = replace(first, has_thumbnail=True)
        assert store.get("Q35517") == pictured
        assert store.by_rows([1, 0, 1]) == [second, pictured, second]
        assert store.thumbnail("Q35517") == b"webp bytes"
        assert store.thumbnail("Q1") is None
    credited = replace(second, image_credits=({"author": "Ann", "source": "https://example.org/é"}, None))
    write_store(tmp_path / "credited.sqlite", [(first, b"webp bytes"), (credited, None)])
    with EntityStore(tmp_path / "credited.sqlite") as store:
        assert store.by_rows([0, 1]) == [pictured, credited]
        assert store.search_titles("plain") == [credited]
    tables = {}
    for name in ("s", "credited"):
        with closing(sqlite3.connect(tmp_path / f"{name}.sqlite")) as db:
            tables[name] = {table for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables["credited"] - tables["s"] == {"credit"}  # stores without credits are as they were


def test_unknown_ids_and_rows(store: EntityStore) -> None:
    with pytest.raises(UnknownEntity, match="no entity 'Q999'"):
        store.get("Q999")
    with pytest.raises(UnknownEntity):
        store.get("\ud800")
    with pytest.raises(UnknownEntity):
        store.thumbnail("Q999")
    with pytest.raises(IndexError):
        store.by_rows([0, 12])
    with pytest.raises(IndexError):
        store.by_rows([-1])
    assert store.by_rows([]) == []
    assert store.thumbnail("Q15083") is None


def test_more_rows_than_one_statement_takes(tmp_path: Path) -> None:
    write_store(tmp_path / "s.sqlite", ((entity(row, f"T{row}"), None) for row in range(1300)))
    with EntityStore(tmp_path / "s.sqlite") as store:
        rows = list(reversed(range(1300)))
        assert [found.row for found in store.by_rows(rows)] == rows


def test_recent_rows_are_cached(store: EntityStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [3, 0, 2]
    assert store.cached(rows) is None
    first = store.by_rows(rows)
    assert {found.row for found in first if found.has_thumbnail} == set(store.thumbnails(rows))
    monkeypatch.setattr(store, "_connection", lambda: pytest.fail("the file was read"))
    assert store.by_rows(rows) == first
    assert store.cached(rows[:2]) == first[:2]


@pytest.mark.parametrize(("bound", "value", "most"), [("_CACHED_ENTITIES", 2, 2), ("_CACHED_TEXT", -1, 0)])
def test_the_cache_is_bounded_and_has_no_long_texts(
    store: EntityStore, monkeypatch: pytest.MonkeyPatch, bound: str, value: int, most: int
) -> None:
    monkeypatch.setattr(f"index.store.{bound}", value)
    every = store.by_rows(range(len(store)))
    for row in (0, 1, 2, 3, 2, 1, 0):
        assert store.by_rows([row]) == [every[row]]
        assert len(store._cache) <= most


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (["animal"], ["Giraffe", "Lion", "Zebra", "Elephant"]),
        (["fruit", "flag"], None),
        (["nothing", "monument"], None),
        (["\ud800", ""], []),
        ([], []),
    ],
)
def test_selection_by_types(store: EntityStore, types: list[str], expected: list[str] | None) -> None:
    selected = [entity.title for entity in store.by_rows(np.flatnonzero(store.select(types).allowed_E).tolist())]
    every = store.by_rows(range(len(store)))
    assert selected == [entity.title for entity in every if set(types) & set(entity.types)]
    assert expected is None or selected == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("Lion", ["Lion", "Lion of Lucerne"]),
        ("lion", ["Lion", "Lion of Lucerne"]),
        ("lion o", ["Lion of Lucerne"]),
        ("LUCERNE lion", ["Lion of Lucerne"]),
        ("cote d'ivoire", ["Flag of Côte d’Ivoire"]),
        ("ivoire", ["Flag of Côte d’Ivoire"]),
        ("girafe", ["Giraffe"]),
        ("长颈", ["Giraffe"]),
        ("gir", ["Giraffe"]),
        ("a & b", ["A & B “Best” (brand)"]),
        ("🦁 lion", ["Lion", "Lion of Lucerne"]),
        ("nothing like it", []),
        ("", []),
        ("  \t ", []),
    ],
)
def test_title_search(store: EntityStore, query: str, expected: list[str]) -> None:
    assert titles(store, query) == expected


@pytest.mark.parametrize(
    "query",
    ['"', "'", "*", '"*', "NOT", "AND OR", "lion NEAR(", "title:lion", "{a}", "-lion", "^lion", "lion\0", "a" * 100_000,
     "\ud83e", "%", "_", "lion; DROP TABLE entity", "\\", "(((", "🦒", "+", "x:y:z", '""""'],
)  # fmt: skip
def test_title_search_takes_any_text(store: EntityStore, query: str) -> None:
    store.search_titles(query)
    assert titles(store, "giraffe") == ["Giraffe"]


def test_words_of_very_many_titles_give_the_shortest_of_a_subset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"Painting {'of ' * (9 - row % 10)}{row}" for row in range(30)]
    write_store(tmp_path / "s", ((entity(row, title), None) for row, title in enumerate(names)))
    monkeypatch.setattr("index.store._MAX_RANKED", 20)
    with EntityStore(tmp_path / "s") as store:
        found = titles(store, "of painting", 5)
        assert len(found) == 5
        assert all("of" in title for title in found)
        assert len(found[0]) == len("Painting of 8")
        assert titles(store, "painting 17") == ["Painting of of 17"]


def test_title_search_respects_its_limit(store: EntityStore) -> None:
    assert len(titles(store, "flag", 2)) == 2
    assert titles(store, "flag", 0) == []


def test_exact_matches_come_first_then_prefixes_then_words(tmp_path: Path) -> None:
    names = ["The big apple", "Apple pie", "Crabapple", "apple", "Pine apple tree"]
    write_store(tmp_path / "s.sqlite", ((entity(row, name), None) for row, name in enumerate(names)))
    with EntityStore(tmp_path / "s.sqlite") as store:
        found = titles(store, "apple")
    assert found[:2] == ["apple", "Apple pie"]
    assert set(found[2:]) == {"The big apple", "Pine apple tree"}


def test_many_threads_read_at_once(store: EntityStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: store.by_rows([number % 12])[0].row, range(400)))
    assert found == [number % 12 for number in range(400)]


def test_equal_entities_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_store(tmp_path / name, ((entity(row, f"Title {row} word{row % 7}"), b"x") for row in range(500)))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_store_is_read_only(store: EntityStore) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._connection().execute("DELETE FROM entity")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[StoredEntity, bytes | None]]:
        yield entity(0, "first"), None
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_store(tmp_path / "s.sqlite", broken())
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(BundleIncomplete, match=r"none\.sqlite is missing"):
        EntityStore(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no database, just text" * 100)
    with pytest.raises(BundleAltered, match=r"text\.sqlite is not an entity store"):
        EntityStore(tmp_path / "text.sqlite")
    (tmp_path / "empty.sqlite").write_bytes(b"")
    with pytest.raises(BundleAltered, match=r"empty\.sqlite is not an entity store"):
        EntityStore(tmp_path / "empty.sqlite")


ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS row FROM n"


def hostile(path: Path, *statements: str) -> Path:
    """Write a store, then change it."""
    write_store(path, [(entity(0, "x"), None)])
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(";".join(statements))
    return path


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (["DROP TABLE entity", f"CREATE VIEW entity AS SELECT row FROM ({ENDLESS})"], "the view entity"),
        (["DROP TABLE thumbnail", "CREATE VIRTUAL TABLE thumbnail USING fts5(row)"], "the table thumbnail"),
        (["CREATE TRIGGER t AFTER INSERT ON entity BEGIN SELECT 1; END"], "the trigger t"),
    ],
)
def test_a_store_with_anything_but_tables_is_refused(tmp_path: Path, statements: list[str], said: str) -> None:
    with pytest.raises(BundleAltered, match=said):
        EntityStore(hostile(tmp_path / "s.sqlite", *statements))


def test_a_statement_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "s.sqlite", ((entity(row, "x"), None) for row in range(1000)))
    monkeypatch.setattr("index.store._STEPS", 100)
    monkeypatch.setattr("index.store._MAX_STATEMENT_S", 0.0)
    with EntityStore(tmp_path / "s.sqlite") as store:
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            store.search_titles("x")
        monkeypatch.setattr(store, "_max_statement_s", 60.0)
        assert len(store.search_titles("x", 3)) == 3
    monkeypatch.setattr("index.store._STEPS", 1)
    monkeypatch.setattr("index.store._MAX_OPENING_S", 0.0)
    with pytest.raises(BundleAltered, match="interrupted"):
        EntityStore(tmp_path / "s.sqlite")


def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    path = tmp_path / "what? 100% #1.sqlite"
    write_store(path, [(entity(0, "here"), None)])
    with EntityStore(path) as store:
        assert titles(store, "here") == ["here"]
