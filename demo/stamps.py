"""The photographs of `make demo-photos`: Tux Paint's stamps, as a catalog of entities.

A stamp is a cut-out picture `NAME.png` with `NAME.txt`: a sentence such as "A dromedary.", then its translations
(`de.utf8=Ein Dromedar.`). Stamps with the same title are images of one entity.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from catalog.records import EntityRecord
from demo.entities import capitalised, slug
from demo.sources import Sense, WordNet

# Folders of drawings, letters and signs, and two drawings elsewhere that look like photographs to `is_photograph`.
_EXCLUDED = re.compile(
    r"(^|/)(cartoon|flags|easter|hanukkah|newyears)/|^symbols/(?!money/)|_symbols/|/Santa\.png$|/sedan_police\.png$"
)
_MIRRORED = re.compile(r"_(mirror|flip)\.png$")
_MIN_PIXELS, _MAX_FLAT = 150, 0.4

# What kinds of things a folder has, as lexicographer files of WordNet: "saw" in `household` is the tool.
_ANIMAL, _ARTIFACT, _FOOD, _OBJECT, _PLANT = "05", "06", "13", "17", "20"
_KINDS = {
    "animals": (_ANIMAL,),
    "food": (_FOOD, _PLANT),
    "plants": (_PLANT, _FOOD),
    "seasonal": (_ARTIFACT, _FOOD),
    "space": (_OBJECT, _ARTIFACT),
}
_TYPES = {
    "arttools": "art tools",
    "auto": "cars",
    "flight": "aircraft",
    "masstransit": "mass transit",
    "naturalforces": "natural forces",
    "roadsigns": "road signs",
}

_PUNCTUATION = re.compile(r"[.!?,:;—(|。।]| [-–] ")
_VERB = re.compile(r" (?:is|are|called|covered|lets|means|resembles) ")
_ENGLISH_START = re.compile(
    r"^(?:an?|the|our|some|two|another) (?:(?:pair|bunch|head|string|plant|quarter) of )?", re.IGNORECASE
)
_QUOTES = re.compile(r"[“”„«»\"]|(?<!\w)['‘]|['’](?!\w)")
_MAX_WORDS, _MAX_WORDS_WITHOUT_ARTICLE = 6, 4
_MAX_MORE_WORDS = 3  # of a title in another language; more are a sentence
_ARTICLE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A stamp's picture, its path without suffix below the stamps' folder, and its texts by language."""

    image: Path
    name: str
    sentence: str
    translations: Mapping[str, str]


def read_stamps(folder: Path) -> list[Stamp]:
    """Read the stamps that are photographs and have a sentence."""
    stamps = []
    for image in sorted(folder.rglob("*.png")):
        path = image.relative_to(folder).as_posix()
        text = image.with_suffix(".txt")
        if _EXCLUDED.search(path) or _MIRRORED.search(path) or not text.exists() or not is_photograph(image):
            continue
        sentence, *lines = text.read_text(encoding="utf-8").splitlines() or [""]
        translations = dict(line.split(".utf8=", 1) for line in lines if ".utf8=" in line)
        if sentence.strip():
            stamps.append(
                Stamp(image=image, name=path.removesuffix(".png"), sentence=sentence.strip(), translations=translations)
            )
    return stamps


def is_photograph(image: Path) -> bool:
    """Return whether few neighbouring pixels are equal. In drawings most are, even with colour gradients."""
    with Image.open(image) as picture:
        rgba_HW4 = np.asarray(picture.convert("RGBA")).astype(np.int16)
    opaque_HW = rgba_HW4[..., 3] > 127
    pairs_HW = opaque_HW[:, 1:] & opaque_HW[:, :-1]
    equal_HW = (rgba_HW4[:, 1:, :3] == rgba_HW4[:, :-1, :3]).all(-1) & pairs_HW
    return bool(opaque_HW.sum() >= _MIN_PIXELS and equal_HW.sum() <= _MAX_FLAT * pairs_HW.sum())


def build_entities(stamps: Iterable[Stamp], wordnet: WordNet) -> list[EntityRecord]:
    """Return one entity for each title, ordered by id. Where WordNet has the title, its gloss is the description."""
    stamps = list(stamps)
    articles = _find_articles(stamps)
    by_title: dict[str, list[Stamp]] = {}
    for stamp in stamps:
        by_title.setdefault(find_title(stamp), []).append(stamp)
    records = []
    for title, same in by_title.items():
        folders = same[0].name.removeprefix("symbols/").split("/")[:-1]
        sense = find_sense(title, folders[0], wordnet)
        gloss = capitalised(sense.gloss) if sense else None
        record = EntityRecord(
            entity_id=slug(title),
            title=title,
            text=f"{same[0].sentence} {gloss}." if gloss else same[0].sentence,
            images=tuple(str(stamp.image) for stamp in same),
            types=tuple(_TYPES.get(folder, folder.replace("_", " ")) for folder in reversed(folders)),
            titles=_translate_title(title, same[0], articles),
            description=gloss,
        )
        records.append(record)
    return sorted(records, key=lambda record: record.entity_id)


def find_title(stamp: Stamp) -> str:
    """Return the thing's name: "Dromedary" for the sentence "A dromedary."

    Exclamations ("Eat your broccoli!") and long sentences say something else. There, the file name is the title.
    """
    phrase = _VERB.split(_phrase(stamp.sentence), maxsplit=1)[0]
    thing = _ENGLISH_START.sub("", phrase)
    most_words = _MAX_WORDS_WITHOUT_ARTICLE if thing == phrase else _MAX_WORDS
    if stamp.sentence[-1] in "!?" or len(phrase.split()) > most_words:
        thing = re.sub("[-_]+", " ", stamp.name.rpartition("/")[2].strip("-_0123456789"))
    return capitalised(thing)


def find_sense(phrase: str, folder: str, wordnet: WordNet) -> Sense | None:
    """Return WordNet's sense of a phrase, in the singular if need be, among the kinds of things in a folder."""
    phrase = phrase.lower().replace("’", "'")
    singular = re.sub(r"(?<=[^s])s$", "", re.sub(r"ies$", "y", phrase))
    kinds = _KINDS.get(folder, (_ARTIFACT,))
    found = (wordnet.noun(each, kind) for kind in kinds for each in (phrase, singular))
    return next((sense for sense in found if sense), None)


def _phrase(sentence: str) -> str:
    """Return a sentence up to its first punctuation, without quotation marks."""
    return _PUNCTUATION.split(_QUOTES.sub("", sentence).strip(" .¡¿"), maxsplit=1)[0].strip()


def _find_articles(stamps: Iterable[Stamp]) -> set[tuple[str, str]]:
    """Return each language's indefinite articles, in lower case: the words that begin a tenth of its sentences."""
    counts: dict[str, Counter[str]] = {}
    for stamp in stamps:
        for language, sentence in stamp.translations.items():
            first, _, rest = sentence.lower().partition(" ")
            counts.setdefault(language, Counter())[first if rest else ""] += 1
    return {
        (language, word)
        for language, words in counts.items()
        for word, count in words.items()
        if word and count >= _ARTICLE_SHARE * words.total()
    }


def _translate_title(title: str, stamp: Stamp, articles: Collection[tuple[str, str]]) -> dict[str, str]:
    """Return the title by BCP 47 language tag, or nothing if the English sentence says more than the title."""
    if _ENGLISH_START.sub("", _phrase(stamp.sentence)).lower() != title.lower():
        return {}
    titles = {}
    for language, sentence in stamp.translations.items():
        words = _phrase(sentence).split()
        if words and (language, words[0].lower()) in articles:
            del words[0]
        if 0 < len(words) <= len(title.split()) + _MAX_MORE_WORDS:
            tag = language.replace("_", "-").replace("@latin", "-Latn").replace("@", "-")
            titles[tag] = capitalised(" ".join(words))
    return titles
