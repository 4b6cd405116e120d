"""The photo demo's catalog and its queries, from made-up stamps and a made-up WordNet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catalog.records import EntityRecord
from demo.photos import find_offsets, find_queries, photograph
from demo.sources import WordNet
from demo.stamps import build_entities, read_stamps

# Synsets of a made-up WordNet: words, lexicographer file, the number of the hypernym's line, gloss.
SYNSETS = [
    ("animal", "05", None, "a living thing that moves"),
    ("camel", "05", 0, "a mammal with one or two humps"),
    ("dromedary", "05", 1, 'one-humped camel; "a dromedary can drink a lot"'),
    ("saw", "10", None, "a condensed but memorable saying"),
    ("saw", "06", None, "hand tool having a toothed blade"),
    ("hen", "05", 0, "female bird"),
    ("cherry", "13", None, "a red fruit"),
    ("lamp", "06", None, "an artificial source of light"),
]


@pytest.fixture
def wordnet(tmp_path: Path) -> WordNet:
    folder = tmp_path / "wordnet"
    folder.mkdir()
    data = ""
    offsets: list[int] = []
    senses: dict[str, list[int]] = {}
    for word, kind, parent, gloss in SYNSETS:
        offset = len(data)
        pointers = "000" if parent is None else f"001 @ {offsets[parent]:08} n 0000"
        data += f"{offset:08} {kind} n 01 {word} 0 {pointers} | {gloss}  \n"
        offsets.append(offset)
        senses.setdefault(word, []).append(offset)
    (folder / "data.noun").write_text(data)
    lines = (f"{w} n {len(s)} 0 {len(s)} 0 {' '.join(f'{o:08}' for o in s)}  \n" for w, s in sorted(senses.items()))
    (folder / "index.noun").write_text("  1 a licence\n" + "".join(lines))
    return WordNet(folder)


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    folder = tmp_path / "stamps"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 4), np.uint8)
    noise[..., 3] = 255
    flat = np.full((40, 40, 4), 255, np.uint8)

    def stamp(name: str, text: str | None, pixels_HW4: np.ndarray = noise) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HW4).save(folder / f"{name}.png")
        if text is not None:
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    stamp("animals/mammals/dromedary", "A dromedary.\nde.utf8=Ein Dromedar.\n")
    stamp("animals/mammals/dromedary-2", "A dromedary.\nde.utf8=Ein Dromedar.\n")
    stamp("animals/birds/hen", "A brown hen.\nde.utf8=Eine (braune) Henne.\npt_BR.utf8=Galinha.\nsr@latin.utf8=Koka.\n")
    stamp("food/fruit/Cherry_Stella2", "Eat your cherries!\nde.utf8=Iss deine Kirschen!\n")
    stamp("household/arttools/saw", "A saw is a tool with teeth.\nde.utf8=Ein Werkzeug mit Zähnen.\n")
    stamp("household/arttools/saw_mirror", "A saw.\n")
    stamp("household/drawn", "A drawing.\n", flat)
    stamp("household/silent", None)
    stamp("animals/birds/cartoon/tux", "A penguin.\n")
    stamp("symbols/alphabets/a", "The letter A.\n")
    return folder


def test_catalog_of_stamps(stamps: Path, wordnet: WordNet) -> None:
    by_id = {record.entity_id: record for record in build_entities(read_stamps(stamps), wordnet)}
    assert list(by_id) == ["brown-hen", "cherry-stella", "dromedary", "saw"]

    dromedary = by_id["dromedary"]
    assert [Path(image).name for image in dromedary.images] == ["dromedary-2.png", "dromedary.png"]
    assert dromedary.titles == {"de": "Dromedar"}
    assert dromedary.types == ("mammals", "animals")
    assert dromedary.description == "One-humped camel"
    assert dromedary.text == "A dromedary. One-humped camel."

    assert by_id["brown-hen"].titles == {"pt-BR": "Galinha", "sr-Latn": "Koka"}, "an article alone is no title"
    assert by_id["brown-hen"].description is None
    assert (by_id["cherry-stella"].title, by_id["cherry-stella"].titles) == ("Cherry Stella", {})
    assert by_id["saw"].types == ("art tools", "household")
    assert (by_id["saw"].description, by_id["saw"].titles) == ("Hand tool having a toothed blade", {})


def test_made_up_photographs(tmp_path: Path) -> None:
    image = np.zeros((60, 30, 4), np.uint8)
    image[20:50, 10:20] = (255, 0, 0, 255)
    Image.fromarray(image).save(tmp_path / "red.png")
    photograph(
        [EntityRecord(entity_id="red", title="Red", images=(str(tmp_path / "red.png"),))], tmp_path / "queries.jsonl"
    )
    row = json.loads((tmp_path / "queries.jsonl").read_text())
    assert row == {"image": "made_up/red.jpg", "entity_id": "red"}
    with Image.open(tmp_path / row["image"]) as photo:
        assert np.asarray(photo).std(axis=(0, 1)).min() > 5, "the background is not plain white"


def test_queries_by_imagenet_ids(tmp_path: Path, wordnet: WordNet) -> None:
    records = [
        EntityRecord(entity_id="dromedary", title="Dromedary", types=("mammals", "animals")),
        EntityRecord(entity_id="brown-dromedary", title="Brown dromedary", types=("mammals", "animals")),
        EntityRecord(entity_id="brown-hen", title="Brown hen", types=("birds", "animals")),
    ]
    offsets = find_offsets(records, wordnet)
    for word in ("dromedary", "animal", "hen", "lamp"):
        sense = wordnet.noun(word)
        assert sense is not None
        folder = tmp_path / "pictures" / f"n{sense.offset:08}"
        folder.mkdir(parents=True)
        (folder / f"{word}.JPEG").touch()
    (tmp_path / "pictures" / "readme.txt").touch()
    lamp = wordnet.noun("lamp")
    assert lamp is not None
    found = {row["data_id"]: row["entity_id"] for row in find_queries(tmp_path / "pictures", offsets, wordnet)}
    assert found == {"dromedary": "dromedary", "hen": "brown-hen", "lamp": f"n{lamp.offset:08}"}
