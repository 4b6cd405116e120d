"""From attention over tokens to the words of a text that mattered most."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]  # start and end in a text, in characters

MAX_WORDS = 12
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def find_attended_words(
    text: str, spans_T: Sequence[Span], weights_T: Sequence[float]
) -> tuple[tuple[int, int, float], ...]:
    """Up to 12 words as (start, end, weight), heaviest first.

    A word weighs what its tokens weigh together, of the attention to the whole text; what goes to punctuation and to
    tokens that are no part of the text (start, end) goes to no word.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    weight_of: dict[Span, float] = {}
    place = 0
    for (start, end), weight in sorted(zip(spans_T, weights_T, strict=True)):
        while place < len(words) and words[place][1] <= start:
            place += 1
        if start < end and place < len(words) and words[place][0] < end:
            weight_of[words[place]] = weight_of.get(words[place], 0.0) + weight
    heaviest = sorted(weight_of.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]
    return tuple((start, end, round(weight, 4)) for (start, end), weight in heaviest)
