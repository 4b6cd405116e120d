"""Tell Wikimedia's kinds of dumps apart by their first lines, to refuse a wrong one before it is read."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from core.errors import CatalogError
from core.lines import read_lines

_KINDS = {  # by the option that takes it; None: no option does
    "--content": ("a CirrusSearch dump", re.compile(rb'\{"index": *\{')),
    "--wikidata": ("a Wikidata dump", re.compile(rb'\{("id": *"[QPL]\d+", *)?"type": *"(item|property|lexeme)"')),
    "--page-props": ("a page_props dump", re.compile(rb"CREATE TABLE `page_props`")),
    None: ("a dump that no option takes", re.compile(rb"<mediawiki |CREATE TABLE `")),
}
_HEAD_LINES = 100


def check_kind(path: Path, option: str) -> None:
    """Raise `CatalogError` if a file is known to be another dump than the option takes."""
    for line, _ in islice(read_lines(path), _HEAD_LINES):
        for wanted_by, (kind, beginning) in _KINDS.items():
            if beginning.match(line):
                if wanted_by == option:
                    return
                advice = f"give it as {wanted_by}" if wanted_by else f"{option} takes {_KINDS[option][0]}"
                raise CatalogError(f"{path} is {kind}, which {option} cannot read; {advice}")
