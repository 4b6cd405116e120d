"""Update the tables of settings and metrics in docs/settings.md from the code: `make settings-docs`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from service.settings import ENV_PREFIX, Settings
from service.telemetry import Metrics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"


def updated(page: str) -> str:
    """Return the page with the current tables. Each heading must be followed by one table."""
    for header, rows in {
        "| variable | meaning | default |\n| --- | --- | --- |\n": settings(),
        "| metric | meaning |\n| --- | --- |\n": metrics(),
    }.items():
        table = header + "".join(f"| {' | '.join(row)} |\n" for row in rows)
        page, count = re.subn(rf"{re.escape(header)}(\|.*\n)*", lambda _, table=table: table, page)
        assert count == 1, header
    return page


def settings() -> Iterator[tuple[str, str, str]]:
    for name, field in Settings.model_fields.items():
        default = "none" if field.default in (None, ()) else f"`{field.default}`"
        yield f"`{ENV_PREFIX}{name.upper()}`", field.description or "", default


def metrics() -> Iterator[tuple[str, str]]:
    for family in Metrics().registry.collect():
        if family.name.startswith("wikiclip_"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield f"`{name}`", family.documentation


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
