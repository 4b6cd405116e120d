"""Write the figures of the pages from the files that commands wrote: `make figures`.

In a sentence, `<!--{claim[date]}-->2026-11-25<!--/-->` is a figure of docs/figures/claim.json. The rows of a table
follow its header, below a comment that names them, and gives a cell of each column for a `row` and its `name`:

    <!-- rows: claim[figures][precisions]
    {name}|{row[ratio][faithful]:.0f} ({row[ratio_interval][faithful]:.0f})
    -->

Cells are format strings; a row that has only the reason why it was `left_out` gets dashes. An interval, a list of two,
is written as 1.0–2.0. Arguments are files that `wikiclip bench` and others wrote: they first replace those of the same
name in docs/figures/.
"""

from __future__ import annotations

import json
import re
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures"
OTHERS = (*(ROOT / "demo").glob("*.json"), ROOT / "evaluation" / "photographs.json")
PAGES = (ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SPAN = re.compile(r"(<!--(\{[^>]*?)-->).*?(<!--/-->)")
TABLE = re.compile(r"(<!-- rows: (.+)\n(.+)\n-->\n\n(?:\|.*\n){2})(?:\|.*\n)*")
RECALL = 0.98  # that the index is chosen for, and that its peers should reach


class _Formatter(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        if isinstance(value, list):
            return "–".join(format(each, spec) for each in value)
        return "—" if value is None else format(value, spec)


class _Object(dict[str, Any]):
    """A JSON object. Format strings turn digits in brackets into numbers, which are no keys of JSON."""

    def __missing__(self, key: object) -> Any:
        if isinstance(key, int):
            return self[str(key)]
        raise KeyError(key)


_FORMATTER = _Formatter()


def updated(page: str, files: Mapping[str, Any]) -> str:
    """Return a page with the current figures. Raise `KeyError` for one that is in no file."""

    def rows(match: re.Match[str]) -> str:
        found, _ = _FORMATTER.get_field(match[2], (), files)
        unknown = "{name}" + match[3].count("|") * "|—"
        lines = [
            _FORMATTER.format(unknown if "left_out" in row else match[3], name=name, row=row)
            for name, row in found.items()
        ]
        return match[1] + "".join(f"| {' | '.join(line.split('|'))} |\n" for line in lines)

    page = TABLE.sub(rows, page)
    return SPAN.sub(lambda span: span[1] + _FORMATTER.vformat(span[2], (), files) + span[3], page)


def read_files() -> dict[str, Any]:
    """Return each file by its name, with its hardware, date and commit as `run`, and tables of the index by size."""
    paths = (*sorted(FOLDER.glob("*.json")), *OTHERS)
    files = {path.stem: json.loads(path.read_bytes(), object_hook=_Object) for path in paths}
    for file in files.values():
        if "hardware" in file:
            commit = "" if file["commit"] == "unknown" else f", commit `{file['commit']}`"
            transcribed = ", transcribed" if file.get("transcribed") else ""
            file["run"] = f"{file['hardware']['name']}, {file['date']}{commit}{transcribed}"
    for index in (files["index"], files["index_peers"]):
        index["sizes"] = {f"{size['vectors']:,}": size for size in index["figures"]["made_up"]["sizes"]}
    [*_, files["index"]["largest"]] = files["index"]["sizes"].values()
    for size in files["index_peers"]["sizes"].values():
        size |= {key: _fastest(peer["points"]) for key, peer in size["peers"].items()}
    files["gpu"]["graph"] = {width: row for width, row in files["gpu"]["figures"]["search"].items() if width.isdigit()}
    files["faults"]["answered"] = sum(part["answered"] for part in files["faults"]["figures"]["parts"].values())
    return files


def _fastest(points: list[dict[str, float]]) -> str:
    """Return the least time with the recall that is wanted, or the best recall that was reached."""
    times_ms = [point["p50_ms"] for point in points if point["recall_at_10"] >= RECALL]
    return f"{min(times_ms):.3g}" if times_ms else f"recall {max(point['recall_at_10'] for point in points):.3f}"


def adopt(result: Path) -> None:
    """Replace the figures of the same name by a result. The command that wrote both stays."""
    path = FOLDER / result.name
    figures = {"command": json.loads(path.read_bytes())["command"], **json.loads(result.read_bytes())}
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    for result in sys.argv[1:]:
        adopt(Path(result))
    files = read_files()
    for path in PAGES:
        path.write_text(updated(path.read_text(encoding="utf-8"), files), encoding="utf-8")


if __name__ == "__main__":
    main()
