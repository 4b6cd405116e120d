"""A plot is well-formed, shows every point where it belongs, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from benchmarks.page import data_uri, page, section, table
from benchmarks.plots import HEIGHT, WIDTH, Bar, Series, bar_plot, line_plot

SVG = "{http://www.w3.org/2000/svg}"


def _plot(**options: object) -> ET.Element:
    series = [
        Series(name="a <b> & c", points=[(1, 10), (10, 20), (100, 40)], intervals=[(8, 12), (15, 25), (30, 50)]),
        Series(name="other", points=[(1, 40), (100, 10)]),
    ]
    labels = {"title": 'A "plot"', "x_label": "load", "y_label": "ms"}
    return ET.fromstring(line_plot(series, **labels, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("x_log", [False, True])
def test_every_point_stands_inside_and_in_order(x_log: bool) -> None:
    root = _plot(x_log=x_log)
    first = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{SVG}circle")][:3]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in first)
    assert [x for x, _ in first] == sorted(x for x, _ in first)
    assert [y for _, y in first] == sorted((y for _, y in first), reverse=True)  # up is less in SVG
    if x_log:  # decades are equally far apart
        assert first[1][0] - first[0][0] == pytest.approx(first[2][0] - first[1][0], abs=0.2)


def test_names_are_escaped_and_told_in_a_legend() -> None:
    texts = [text.text for text in _plot().iter(f"{SVG}text")]
    assert {"a <b> & c", "other", "load", "ms"} <= set(texts)


def test_bars_are_as_long_as_their_values() -> None:
    root = ET.fromstring(
        bar_plot([Bar(name="x", value=25, interval=(20, 30)), Bar(name="y", value=50)], title="t", x_label="%")
    )
    widths = [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if r.attrib.get("fill") == "var(--c0)"]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert sum(line.attrib["class"] == "whisker" for line in root.iter(f"{SVG}line")) == 3


@pytest.mark.parametrize("points", [[], [(0.0, 1.0)], [(float("nan"), 1.0)]])
def test_what_cannot_be_plotted(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        line_plot([Series(name="a", points=points)], title="t", x_label="x", y_label="y", x_log=True)


def test_one_point_and_equal_values_are_plotted() -> None:
    ET.fromstring(line_plot([Series(name="a", points=[(3, 7)])], title="t", x_label="x", y_label="y"))


def test_a_page_needs_nothing_from_elsewhere() -> None:
    plot = line_plot([Series(name="a", points=[(1, 2), (2, 3)])], title="t", x_label="x", y_label="y")
    html = page("<title>", section("Results", table(["a", "b"], [["<1>", "2"]]), plot, data_uri(b"x", "image/png")))
    assert "&lt;title&gt;" in html
    assert "&lt;1&gt;" in html
    assert set(re.findall(r"https?://[^\"' <]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
