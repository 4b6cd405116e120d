"""Plots are well-formed and show every point. Pages need nothing from other hosts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from core.errors import UserError
from evaluation import pages
from evaluation.pages import (
    Bar,
    Bars,
    Lines,
    Report,
    Series,
    bar_plot,
    body_of,
    data_uri,
    figures_page,
    line_plot,
    page,
    section,
    table,
)

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"title": 'A "plot"', "x_label": "load", "y_label": "ms"}


def _plot(*, x_log: bool = False) -> ET.Element:
    series = [
        Series(name="a <b> & c", points=[(1, 10), (10, 20), (100, 40)], intervals=[(8, 12), (15, 25), (30, 50)]),
        Series(name="other", points=[(1, 40), (100, 10)]),
    ]
    return ET.fromstring(line_plot(series, **LABELS, x_log=x_log))


def _markers(root: ET.Element, variable: str) -> list[tuple[float, float]]:
    """Return the positions of the markers of one series, without the legend's."""
    uses = [use.attrib for use in root.iter(f"{SVG}use") if f"stroke: var(--{variable})" in use.attrib.get("style", "")]
    return [(float(use["x"]), float(use["y"])) for use in uses]


@pytest.mark.parametrize("x_log", [False, True])
def test_points_are_inside_the_plot_and_in_order(x_log: bool) -> None:
    root = _plot(x_log=x_log)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    points = _markers(root, "c0")[:3]
    assert all(0 < x < width and 0 < y < height for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)  # y points down in SVG
    if x_log:
        assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)


def test_names_are_escaped_and_in_the_legend() -> None:
    root = _plot()
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {"a <b> & c", "other", "load", "ms"} <= texts
    assert root.attrib["aria-label"] == 'A "plot"'


def test_bars_are_as_long_as_their_values() -> None:
    root = ET.fromstring(
        bar_plot([Bar(name="x", value=25, interval=(20, 30)), Bar(name="y", value=50)], title="t", x_label="%")
    )
    paths = [path.attrib["d"] for path in root.iter(f"{SVG}path") if "fill: var(--c0)" in path.attrib.get("style", "")]
    edges = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path in paths]
    widths = [max(xs) - min(xs) for xs in edges]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert {"x", "y", "25", "50"} <= {(text.text or "").strip() for text in root.iter(f"{SVG}text")}


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(float("nan"), 1.0)]])
def test_points_that_cannot_be_plotted_are_an_error(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        line_plot([Series(name="a", points=points)], **LABELS, x_log=True)


def test_one_point_is_plotted() -> None:
    ET.fromstring(line_plot([Series(name="a", points=[(3, 7)])], **LABELS))


def test_a_page_needs_nothing_from_other_hosts() -> None:
    plot = line_plot([Series(name="a", points=[(1, 2), (2, 3)])], **LABELS)
    html = page("<title>", section("Results", table(["a", "b"], [["<1>", "2"]]), plot, data_uri(b"x", "image/png")))
    assert "&lt;title&gt;" in html
    assert "&lt;1&gt;" in html
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= namespaces
    assert "@import" not in html


def test_the_body_of_a_page_can_be_embedded() -> None:
    assert body_of(page("title", "<p>body</p>")).strip() == "<p>body</p>"


FIGURES = {
    "systems": {"ours": {"per_s": 20.0}, "theirs": {"per_s": None}, "third": {"per_s": 5}},
    "growth": {
        "exact": {
            "1000": {"median": 3.0, "interval": [2.0, 4.0], "samples": [3.0], "unit": "ms"},
            "10": {"median": 1.0, "interval": [1.0, 1.5], "samples": [1.0], "unit": "ms"},
        }
    },
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
    with pytest.raises(UserError, match=r"need matplotlib.*wikiclip-serve\[report\]"):
        pages.require_libraries()
