"""One line to show of a text."""

from __future__ import annotations

import re

_MAX_CHARACTERS = 200
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")


def first_sentence(text: str) -> str | None:
    """The first sentence of a text, cut at 200 characters; None of a blank one."""
    stripped = text.strip()
    if not stripped:
        return None
    sentence = _SENTENCE_END.split(stripped, maxsplit=1)[0].strip()
    if len(sentence) <= _MAX_CHARACTERS:
        return sentence
    return sentence[: _MAX_CHARACTERS - 1].rsplit(" ", 1)[0].rstrip(",;: ") + "…"
