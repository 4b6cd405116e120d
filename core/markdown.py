"""Generated tables in Markdown pages."""

from pathlib import Path

from core.errors import UserError
from core.files import atomic_write_bytes


def fill_in(page: Path, target: str, text: str) -> None:
    """Replace what is between the two markers of a make target in a page. Raises `UserError` if one is missing."""
    start, end = f"<!-- {target}: written by `make {target}` -->", f"<!-- /{target} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise UserError(f"{page} has no place for the table; add two lines, {start} and {end}")
    atomic_write_bytes(page, f"{before}{start}\n\n{text}\n\n{end}{after}".encode())
