"""The part of WordNet that is needed: nouns, and the first sense of one with gloss and hypernym, from its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Sense:
    gloss: str
    hypernym: str | None


class WordNet:
    """Nouns by lemma (file formats: wndb(5) of WordNet 3.1)."""

    def __init__(self, folder: Path) -> None:
        self._data = (folder / "data.noun").read_bytes()
        self._first_sense: dict[str, int] = {}
        with (folder / "index.noun").open(encoding="ascii") as file:
            for line in file:
                if not line.startswith(" "):
                    fields = line.split()
                    senses = int(fields[2])
                    self._first_sense[fields[0]] = int(fields[-senses])

    def noun(self, phrase: str) -> Sense | None:
        """The most frequent sense of a noun phrase in lower case, or None where WordNet lacks it."""
        offset = self._first_sense.get(phrase.replace(" ", "_"))
        return None if offset is None else self._sense(offset)

    def _line(self, offset: int) -> str:
        return self._data[offset : self._data.index(b"\n", offset)].decode("ascii")

    def _sense(self, offset: int) -> Sense:
        facts, _, gloss = self._line(offset).partition("|")
        fields = facts.split()
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]
        parents = [int(pointers[i + 1]) for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")]
        hypernym = self._line(parents[0]).split()[4].replace("_", " ") if parents else None
        definition = gloss.split('; "')[0].strip()
        return Sense(gloss=definition, hypernym=hypernym)


def nouns(folder: Path) -> Iterator[str]:
    """Every noun as the synsets spell it, capitals included; one that is in several synsets comes several times."""
    with (folder / "data.noun").open(encoding="ascii") as file:
        for line in file:
            if not line.startswith(" "):
                fields = line.partition("|")[0].split()
                yield from (word.replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
