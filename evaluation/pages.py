"""Self-contained HTML pages (Jinja2) and SVG plots (matplotlib) for reports. Both come with the extra `report`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce
from html import escape
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_LIST = 20  # in a table of figures
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
        if len(figures) > _LONGEST_LIST:
            yield path, f"{len(figures)} rows"
            return
        for number, below in enumerate(figures):
            yield from _flat(below, f"{path} {number}".strip())
    else:
        yield path, ", ".join(map(str, figures)) if isinstance(figures, list) else str(figures)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar for each value that a path matches: a number, or a metric with `median` and `interval`.

    `*` in a path matches every key or position. `intervals` are paths that match an interval for each value, in order.
    """

    title: str
    label: str
    values: Sequence[str]
    intervals: Sequence[str] = ()

    def svg(self, figures: Any) -> str:
        found = [match for path in self.values for match in _select(figures, path)]
        intervals = [interval for path in self.intervals for _, interval in _select(figures, path)]
        bars = []
        for name, (_, value), interval in zip_longest(_names([names for names, _ in found]), found, intervals):
            number, own_interval = _number(value)
            if number is not None:
                bars.append(Bar(name=name, value=number, interval=interval or own_interval))
        return bar_plot(bars, title=self.title, x_label=self.label) if bars else ""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A line through the points that a path matches, for each parent of them and each of the paths `y` within a point.

    `*` in a path matches every key or position. A path that does not end with it matches one point. `x` is a path
    within a point. An empty `x` is the point's own key, and an empty `y` is the point itself.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[str]
    y: Sequence[str]
    x: str = ""
    x_log: bool = False
    y_log: bool = False

    def svg(self, figures: Any) -> str:
        lines: dict[tuple[str, ...], list[tuple[float, float, Any]]] = {}
        for path in self.points:
            for names, point in _select(figures, path):
                *parents, key = names if path.endswith("*") else (*names, "")
                for y in self.y:
                    number, interval = _number(_at(point, y))
                    if number is not None:
                        x = float(_at(point, self.x) if self.x else key)
                        lines.setdefault((*parents, y), []).append((x, number, interval))
        series = []
        for name, found in zip(_names(list(lines)), lines.values(), strict=True):
            found.sort(key=lambda point: point[:2])
            intervals = [interval for _, _, interval in found if interval]
            series.append(Series(name=name, points=[(x, y) for x, y, _ in found], intervals=intervals))
        if not series:
            return ""
        return line_plot(
            series, title=self.title, x_label=self.x_label, y_label=self.y_label, x_log=self.x_log, y_log=self.y_log
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows of a benchmark's figures, above a table of all of them."""

    title: str
    text: str = ""
    plots: Sequence[Bars | Lines] = ()


def figures_page(title: str, parts: Mapping[str, tuple[Report, Any]]) -> str:
    """Return an HTML document with the figures of each part, by its name."""
    shown = {
        name: (report, [svg for plot in report.plots if (svg := plot.svg(figures))], _flat(figures))
        for name, (report, figures) in parts.items()
    }
    return render("figures.html", title=title, parts=shown)


def _select(figures: Any, path: str) -> list[tuple[tuple[str, ...], Any]]:
    """Return what a path matches, each with its own path."""
    matches: list[tuple[tuple[str, ...], Any]] = [((), figures)]
    for part in path.split("/"):
        below: list[tuple[tuple[str, ...], Any]] = []
        for names, node in matches:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            below += [((*names, str(key)), value) for key, value in items if part in ("*", str(key))]
        matches = below
    return matches


def _at(point: Any, path: str) -> Any:
    return reduce(lambda node, key: node[key], path.split("/"), point) if path else point


def _number(value: Any) -> tuple[float | None, Any]:
    """Return a number, or the median of a metric and its interval."""
    return (value["median"], tuple(value["interval"])) if isinstance(value, dict) else (value, None)


def _names(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return a name for each path, without the parts that all have in common."""
    shared = set(paths[0]).intersection(*paths) if paths else set()
    names = (", ".join(part for part in path if part not in shared) or path[-1] for path in paths)
    return [name.replace("_", " ") for name in names]


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
