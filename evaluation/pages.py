"""Self-contained HTML pages (Jinja2) and SVG plots (matplotlib) for reports. Both come with the extra `report`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / "templates"
_INK = "#1d2430"
# Plots follow the light or dark colours of the page: these become its CSS variables.
_VARIABLES = {
    _INK: "ink", "#d9dee7": "faint",
    "#2563c4": "c0", "#b8520a": "c1", "#15803d": "c2", "#7e3fb8": "c3", "#b4263f": "c4", "#4b5563": "c5",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot. `intervals` has (low, high) for each point, or is empty."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Bar:
    name: str
    value: float
    interval: tuple[float, float] | None = None


def require_libraries() -> None:
    """Raise `UserError` if Jinja2 or matplotlib is missing."""
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        install = "pip install 'wikiclip-serve[report]'"
        raise UserError(f"reports need {' and '.join(missing)}; install the extra `report`: {install}")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_TEMPLATES)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values: Any) -> str:
    """Return a template of this package as HTML. Text is escaped unless the template marks it as safe."""
    return _environment().get_template(template).render(**values)


def page(title: str, body: str) -> str:
    """Return an HTML document. `title` is text, `body` is HTML."""
    return render("page.html", title=title, body=body)


def body_of(document: str) -> str:
    """Return the HTML below the title of a document made by `page`."""
    return document.partition("</h1>\n")[2].rpartition("\n</body>")[0]


def section(heading: str, *blocks: str) -> str:
    """Return a heading and the HTML blocks below it."""
    return render("section.html", heading=heading, blocks=blocks)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts. The first column is left-aligned, the others are right-aligned."""
    return render("table.html", header=header, rows=rows)


def figures_table(figures: Any) -> str:
    """Return a table of all figures by their path. A metric with samples shows its median and interval."""
    return table(["figure", "value"], list(_flat(figures)))


def _flat(figures: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(figures, dict) and {"median", "interval", "samples"} <= figures.keys():
        low, high = figures["interval"]
        yield path, f"{figures['median']} {figures.get('unit', '')} ({low} to {high})"
    elif isinstance(figures, dict):
        for name, below in figures.items():
            yield from _flat(below, f"{path} {name}".strip())
    elif isinstance(figures, list) and any(isinstance(each, dict | list) for each in figures):
        for number, below in enumerate(figures):
            yield from _flat(below, f"{path} {number}".strip())
    else:
        yield path, ", ".join(map(str, figures)) if isinstance(figures, list) else str(figures)


def data_uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    diagonal: bool = False,
) -> str:
    """Return an SVG of lines, with bands for intervals. `diagonal` adds y = x.

    Raise `ValueError` if there is no point, or one that the axes cannot show.
    """
    _check([x for each in series for x, _ in each.points], log=x_log)
    _check([y for each in series for _, y in each.points], log=y_log)
    with _figure(3.6) as figure:
        axes = figure.add_subplot()
        for each in series:
            xs = [x for x, _ in each.points]
            (line,) = axes.plot(xs, [y for _, y in each.points], marker="o", markersize=4, label=each.name)
            if each.intervals:
                low, high = zip(*each.intervals, strict=True)
                axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
        if diagonal:
            axes.axline((0, 0), slope=1, color=_INK, linestyle=":", alpha=0.6)
        axes.set(xlabel=x_label, ylabel=y_label, xlim=x_range, ylim=y_range)
        axes.set(xscale="log" if x_log else "linear", yscale="log" if y_log else "linear")
        if len(series) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return _svg(figure, title)


def bar_plot(bars: Sequence[Bar], *, title: str, x_label: str, x_range: tuple[float, float] | None = None) -> str:
    """Return an SVG of horizontal bars from top to bottom, with values and intervals.

    Raise `ValueError` if there is no bar, or one without a finite value.
    """
    _check([bar.value for bar in bars], log=False)
    with _figure(0.8 + 0.3 * len(bars)) as figure:
        axes = figure.add_subplot()
        for number, bar in enumerate(bars):
            axes.barh(number, bar.value, height=0.6, color="C0")
            if bar.interval:
                axes.plot(bar.interval, [number, number], color=_INK, linestyle="-", marker="|")
            end = max(0.0, bar.value, *(bar.interval or ()))
            axes.annotate(f"{bar.value:.4g}", (end, number), (6, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set(xlabel=x_label, xlim=x_range)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        return _svg(figure, title)


def _check(values: Sequence[float], *, log: bool) -> None:
    if not values or not all(math.isfinite(value) for value in values) or (log and min(values) <= 0):
        raise ValueError("nothing to plot: no value, one that is not finite, or one below 0 on a logarithmic axis")


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """Draw within the block, in the style of the reports."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(_TEMPLATES / "plots.mplstyle"):
        yield Figure(figsize=(6.6, height), layout="constrained")


def _svg(figure: Figure, title: str) -> str:
    """Return an SVG element in the colours of the page, without XML prolog and metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg class="plot" role="img" aria-label="{escape(title)}" ', 1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
