"""Self-contained HTML pages (Jinja2) and SVG plots (matplotlib) for reports. Both come with the extra `report`."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from html import escape
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catalog import EntityRecord, is_url, read_catalog
from catalog.images import MAX_PIXELS
from core.errors import TooLarge, UndecodableImage, missing_extra
from core.files import atomic_write_bytes
from evaluation.metrics import (
    RECALL_AT,
    AnsweredQuery,
    Evaluation,
    confidences_of,
    distinct_splits,
    format_interval,
    level_lines,
    reliability,
)
from imaging import make_thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from service.recognizer import Recognizer

CONFUSIONS = 24
_TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_LIST = 20  # in a table of figures
_IMAGE_PX = 160
_INK = "#1d2430"
# Plots follow the light or dark colours of the page: these become its CSS variables.
_VARIABLES = {
    _INK: "ink", "#d9dee7": "faint",
    "#2563c4": "c0", "#b8520a": "c1", "#15803d": "c2", "#7e3fb8": "c3", "#b4263f": "c4", "#4b5563": "c5",
}  # fmt: skip


def require_libraries() -> None:
    """Raise `MissingExtra` if Jinja2 or matplotlib is missing."""
    for name in ("jinja2", "matplotlib"):
        if find_spec(name) is None:
            raise missing_extra("a report", name)


def render(template: str, **values: Any) -> str:
    """Return a template of this package as HTML. Text is escaped unless the template marks it as safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


# ---- plots ----


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
        """Return the plot, empty if there is no value."""
        found = [match for path in self.values for match in _select(figures, path)]
        intervals = [interval for path in self.intervals for _, interval in _select(figures, path)]
        bars = []
        for name, (_, value), interval in zip_longest(_names([names for names, _ in found]), found, intervals):
            number, own_interval = _number(value)
            if number is not None:
                bars.append((name, number, interval or own_interval))
        if not bars:
            return ""
        with _figure(0.8 + 0.3 * len(bars)) as figure:
            axes = figure.add_subplot()
            for position, (_, number, interval) in enumerate(bars):
                axes.barh(position, number, height=0.6, color="C0")
                if interval:
                    axes.plot(interval, [position, position], color=_INK, linestyle="-", marker="|")
                end = max(0.0, number, *(interval or ()))
                axes.annotate(f"{number:.4g}", (end, position), (6, 0), textcoords="offset points", va="center")
            axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
            axes.set(xlabel=self.label)
            axes.grid(visible=False, axis="y")
            axes.invert_yaxis()
            return _svg(figure, self.title)


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A line through the points that a path matches, for each parent of them and each of the paths `y` within a point.

    `*` in a path matches every key or position. A path that does not end with it matches one point. `x` is a path
    within a point. An empty `x` is the point's own key, and an empty `y` is the point itself. `diagonal` adds y = x.
    """

    title: str
    x_label: str
    y_label: str
    points: Sequence[str]
    y: Sequence[str]
    x: str = ""
    x_log: bool = False
    y_log: bool = False
    diagonal: bool = False

    def svg(self, figures: Any) -> str:
        """Return the plot, empty if there is no point."""
        lines: dict[tuple[str, ...], list[tuple[float, float, Any]]] = {}
        for path in self.points:
            for (*parents, key), point in _select(figures, path):
                line_name = parents if path.endswith("*") else (*parents, key)
                for y in self.y:
                    number, interval = _number(_at(point, y))
                    if number is not None:
                        x = float(_at(point, self.x) if self.x else key)
                        lines.setdefault((*line_name, y), []).append((x, number, interval))
        if not lines:
            return ""
        with _figure(3.6) as figure:
            axes = figure.add_subplot()
            for name, points in zip(_names(list(lines)), lines.values(), strict=True):
                points.sort(key=lambda point: point[:2])
                xs, ys, intervals = zip(*points, strict=True)
                (line,) = axes.plot(xs, ys, marker="o", markersize=4, label=name)
                if all(intervals):
                    low, high = zip(*intervals, strict=True)
                    axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.18, linewidth=0)
            if self.diagonal:
                axes.axline((0, 0), slope=1, color=_INK, linestyle=":", alpha=0.6)
            axes.set(xlabel=self.x_label, ylabel=self.y_label)
            axes.set(xscale="log" if self.x_log else "linear", yscale="log" if self.y_log else "linear")
            if len(lines) > 1:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
            return _svg(figure, self.title)


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
    """Return a number that can be plotted, and the interval if it is the median of a metric."""
    number, interval = (value["median"], value["interval"]) if isinstance(value, dict) else (value, None)
    return (number if number is not None and math.isfinite(number) else None), interval


def _names(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return a name for each path, without the parts that all have in common."""
    shared = set(paths[0]).intersection(*paths) if paths else set()
    names = (", ".join(part for part in path if part not in shared) or path[-1] for path in paths)
    return [name.replace("_", " ") for name in names]


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


# ---- benchmarks ----


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a page shows of a benchmark's figures, above a table of all of them."""

    title: str
    text: str = ""
    plots: Sequence[Bars | Lines] = ()


def figures_page(title: str, parts: Mapping[str, tuple[Report, Any]]) -> str:
    """Return an HTML document with the figures of each part, by its name."""
    shown = {
        name: (report, [plot.svg(figures) for plot in report.plots], _flat(figures))
        for name, (report, figures) in parts.items()
    }
    return render("figures.html", title=title, parts=shown)


def _flat(figures: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield all figures with their path. A metric with samples is its median and interval."""
    if isinstance(figures, dict) and {"median", "interval", "samples"} <= figures.keys():
        low, high = figures["interval"]
        yield path, f"{figures['median']} {figures.get('unit', '')} ({low} to {high})"
    elif isinstance(figures, dict):
        for name, below in figures.items():
            yield from _flat(below, f"{path} {name}".strip())
    elif not isinstance(figures, list) or not any(isinstance(each, dict | list) for each in figures):
        yield path, ", ".join(map(str, figures)) if isinstance(figures, list) else str(figures)
    elif len(figures) > _LONGEST_LIST:
        yield path, f"{len(figures)} rows"
    else:
        for number, below in enumerate(figures):
            yield from _flat(below, f"{path} {number}".strip())


# ---- accuracy ----

_SPLITS = Bars(
    title="Top-1 accuracy by split", label="top-1, %", values=("*/recall_at_1",), intervals=("*/interval_at_1",)
)
_RECALL = Lines(
    title="Recall at k", x_label="k, number of predictions", y_label="recall@k, %", points=("*/*",), y=("",)
)
_LEVELS = Lines(
    title="Answers at some level", x_label="threshold", y_label="%", points=("*",), x="threshold",
    y=("answered", "right", "entity", "entity_right"),
)  # fmt: skip
_RELIABILITY = Lines(
    title="Reliability", x_label="confidence of the best prediction", y_label="accuracy", points=("*",),
    x="confidence", y=("accuracy",), diagonal=True,
)  # fmt: skip


def write_report(
    path: Path,
    recognizer: Recognizer,
    evaluation: Evaluation,
    answered: Sequence[AnsweredQuery],
    *,
    catalog: Path | None,
    held_out: int,
    comparison: str,
) -> None:
    """Write the report of an evaluation: figures, plots and the costliest confusions.

    Images of entities come from `catalog`, otherwise from the bundle's thumbnails. `comparison` may be empty.
    """
    shown = confusions(answered)[:CONFUSIONS]
    pairs = [(group[0].entity, group[0].best) for group in shown]
    shown_ids = {each.entity_id for pair in pairs for each in pair if each is not None}
    images = {} if catalog is None else _catalog_images(catalog, shown_ids)
    with recognizer.acquire() as loaded:
        for entity_id in shown_ids - images.keys():
            if webp := loaded.entities.thumbnail(entity_id):
                images[entity_id] = _data_uri(webp)
        searched = loaded.entities.entity_count - held_out
    bins = reliability(*confidences_of([each for each in answered if each.in_catalog]))
    recalls = {
        name: {k: {"median": row[f"recall_at_{k}"], "interval": row.get(f"interval_at_{k}")} for k in RECALL_AT}
        for name, row in evaluation.recall.items()
        if name in ("seen", "unseen", "all")
    }
    document = render(
        "report.html",
        title=f"Accuracy of {recognizer.label}",
        evaluation=evaluation,
        splits=distinct_splits(evaluation.recall),
        searched=searched,
        held_out=held_out,
        comparison=comparison,
        split_plot=_SPLITS.svg(evaluation.recall),
        recall_plot=_RECALL.svg(recalls),
        bins=bins,
        recall_at=RECALL_AT,
        format_interval=format_interval,
        level_lines=list(level_lines(evaluation.levels)),
        level_plot=_LEVELS.svg(evaluation.levels.get("curve", [])),
        reliability_plot=_RELIABILITY.svg([asdict(each) for each in bins]),
        confusions=[(group, _thumbnail(group[0].image)) for group in shown],
        images=images,
    )
    atomic_write_bytes(path, document.encode())


def confusions(answered: Sequence[AnsweredQuery]) -> list[list[AnsweredQuery]]:
    """Return the wrongly answered queries for entities in the catalog, grouped by entity and answer.

    The groups come by falling sum of confidences, and so do the queries of a group.
    """
    groups: dict[tuple[str, str], list[AnsweredQuery]] = {}
    for each in sorted(answered, key=_cost, reverse=True):
        if each.in_catalog and each.entity and each.best and each.rank != 1:
            groups.setdefault((each.entity.entity_id, each.best.entity_id), []).append(each)
    return sorted(groups.values(), key=lambda group: -sum(map(_cost, group)))


def _cost(query: AnsweredQuery) -> float:
    """Return the confidence of the answer, 1 without confidences."""
    return 1.0 if query.best is None or query.best.confidence is None else query.best.confidence


def _catalog_images(catalog: Path, entity_ids: Collection[str]) -> dict[str, str]:
    """Return the first readable image of each of these entities as a data URI."""
    images: dict[str, str] = {}
    for item in read_catalog(catalog):
        if isinstance(item, EntityRecord) and item.entity_id in entity_ids:
            uris = (uri for image in item.images if not is_url(image) and (uri := _thumbnail(Path(image))))
            if uri := next(uris, None):
                images[item.entity_id] = uri
    return images


def _thumbnail(path: Path | None) -> str | None:
    """Return a small version of an image file as a data URI, None if it cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        return _data_uri(make_thumbnail(path.read_bytes(), _IMAGE_PX, max_pixels=MAX_PIXELS))
    except (UndecodableImage, TooLarge):
        return None


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
