"""One self-contained HTML page: what a benchmark has to show, without a file or a host beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --muted: #5c6675; --faint: #d9dee7; --paper: #ffffff;
  --card: #f5f7fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ee; --muted: #9aa5b5; --faint: #3a4352; --paper: #14181f;
  --card: #1c222c; } }
body { margin: 2rem auto; max-width: 64rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } p { max-width: 46rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--faint); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td small, .muted { color: var(--muted); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: .8rem; }
.card .images { display: flex; gap: .6rem; } figure { margin: 0; flex: 1; min-width: 0; }
figure img, figure .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border-radius: 4px; }
figure .none { display: grid; place-items: center; background: var(--faint); color: var(--muted); }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
"""


def page(title: str, body: str) -> str:
    """The HTML document; `body` is HTML, `title` text. It is light or dark as the reader's system is."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def body_of(document: str) -> str:
    """What stands under the title of a page made by `page`, to be shown as a part of another."""
    return document.partition("</h1>\n")[2].rpartition("\n</body>")[0]


def section(heading: str, *blocks: str) -> str:
    """A heading over blocks of HTML."""
    return "\n".join((f"<section><h2>{escape(heading)}</h2>", *blocks, "</section>"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; the first column stands left, figures right."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
