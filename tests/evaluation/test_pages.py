"""Plots are well-formed and show every point. Pages need nothing from other hosts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from core.errors import UserError
from evaluation import pages
from evaluation.pages import Bars, Lines, Report, figures_page

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"title": 'A "plot"', "x_label": "load", "y_label": "ms"}


def _metric(median: float, low: float, high: float) -> dict[str, object]:
    return {"median": median, "interval": [low, high], "samples": [median], "unit": "ms"}


TWO_LINES = {
    "a <b> & c": {"1": _metric(10, 8, 12), "10": _metric(20, 15, 25), "100": _metric(40, 30, 50)},
    "other": {"1": 40, "100": 10},
}


def _plot(figures: object, *, x_log: bool = False) -> ET.Element:
    return ET.fromstring(Lines(**LABELS, points=["*/*"], y=[""], x_log=x_log).svg(figures))


def _markers(root: ET.Element, variable: str) -> list[tuple[float, float]]:
    """Return the positions of the markers of one series, without the legend's."""
    uses = [use.attrib for use in root.iter(f"{SVG}use") if f"stroke: var(--{variable})" in use.attrib.get("style", "")]
    return [(float(use["x"]), float(use["y"])) for use in uses]


@pytest.mark.parametrize("x_log", [False, True])
def test_points_are_inside_the_plot_and_in_order(x_log: bool) -> None:
    root = _plot(TWO_LINES, x_log=x_log)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    points = _markers(root, "c0")[:3]
    assert all(0 < x < width and 0 < y < height for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)  # y points down in SVG
    if x_log:
        assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


def test_names_are_escaped_and_in_the_legend() -> None:
    root = _plot(TWO_LINES)
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"a <b> & c", "other", "load", "ms"} <= texts
    assert root.attrib["aria-label"] == 'A "plot"'


def test_bars_are_as_long_as_their_values() -> None:
    figures = {"x": _metric(25, 20, 30), "y": 50}
    root = ET.fromstring(Bars(title="t", label="%", values=["*"]).svg(figures))
    paths = [path.attrib["d"] for path in root.iter(f"{SVG}path") if "fill: var(--c0)" in path.attrib.get("style", "")]
    edges = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path in paths]
    widths = [max(xs) - min(xs) for xs in edges]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert {"x", "y", "25", "50"} <= {(text.text or "").strip() for text in root.iter(f"{SVG}text")}


def test_what_cannot_be_plotted_is_left_out() -> None:
    assert Lines(**LABELS, points=["*/*"], y=[""]).svg({"a": {"1": None, "2": float("nan")}}) == ""
    assert len(_markers(_plot({"a": {"3": 7, "4": None}}), "c0")) == 1


FIGURES = {
    "systems": {"ours": {"per_s": 20.0}, "theirs": {"per_s": None}, "third": {"per_s": 5}},
    "growth": {"exact": {"1000": _metric(3.0, 2.0, 4.0), "10": _metric(1.0, 1.0, 1.5)}},
    "ramp": [{"load": number, "latency": {"p50_ms": 2.0 * number}} for number in range(1, 31)],
}


def _texts(svg: str) -> set[str]:
    return {(text.text or "").strip() for text in ET.fromstring(svg).iter(f"{SVG}text")}


def test_bars_are_named_by_where_their_paths_differ() -> None:
    texts = _texts(Bars(title="t", label="images/s", values=("systems/*/per_s",)).svg(FIGURES))
    assert {"ours", "third", "20", "5", "images/s"} <= texts
    assert "theirs" not in texts  # it has no value
    assert Bars(title="t", label="x", values=("nothing/*",)).svg(FIGURES) == ""


def test_lines_go_through_rows_and_through_metrics_by_key() -> None:
    rows = Lines(title="t", x_label="x", y_label="y", points=("ramp/*",), x="load", y=("latency/p50_ms",))
    assert len(_markers(ET.fromstring(rows.svg(FIGURES)), "c0")) == 30
    growth = Lines(title="t", x_label="x", y_label="y", points=("growth/*/*",), y=("",))
    (small, _), (large, _) = _markers(ET.fromstring(growth.svg(FIGURES)), "c0")
    assert small < large


def test_a_page_of_figures_has_every_part() -> None:
    report = Report(
        title="Speed", text="Fast <enough>.", plots=[Bars(title="t", label="x", values=("systems/*/per_s",))]
    )
    html = figures_page("All", {"speed": (report, FIGURES), "other": (Report(title="Other"), {"seconds": [1, 2]})})
    assert html.count("<svg") == 1
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= namespaces
    assert "@import" not in html
    for part in (
        'id="speed"',
        'href="#other"',
        "<td>1, 2</td>",
        "Fast &lt;enough&gt;.",
        "3.0 ms (2.0 to 4.0)",
        "30 rows",
    ):
        assert part in html


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(UserError, match=r"needs matplotlib.*wikiclip-serve\[report\]"):
        pages.require_libraries()
