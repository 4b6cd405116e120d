"""Ids that were seen are found again, beyond what is kept in memory."""

from __future__ import annotations

import pytest

from catalog import seen
from catalog.seen import SeenIds


def test_an_id_is_new_once() -> None:
    with SeenIds() as ids:
        assert [ids.add(entity_id) for entity_id in ("Q1", "q1", "Q1", "Ü", "U", "Ü")] == [
            True, True, False, True, True, False,
        ]  # fmt: skip


def test_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_CACHE_KIB", 64)
    with SeenIds() as ids:
        assert all(ids.add(f"Q{number}") for number in range(20_000))
        assert not any(ids.add(f"Q{number}") for number in range(0, 20_000, 7))
        assert ids.add("Q20000")
