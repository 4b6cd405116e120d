"""Plots as plain SVG: lines, several series each, and bars, with intervals where there are any.

A plot is a string that stands in an HTML page or in a file of its own. It takes its colours from the reader's light or
dark setting, and depends on nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 48
_LEGEND_ROW = 20
_CHARACTER_WIDTH = 7.2  # of the labels' 12 px letters, generously
_BAR_ROW = 28
_DASHES = ("", "6 3", "2 3", "8 3 2 3")

STYLE = """
.plot { --ink: #1d2430; --faint: #d9dee7; --paper: #ffffff;
  --c0: #2563c4; --c1: #b8520a; --c2: #15803d; --c3: #7e3fb8; --c4: #b4263f; --c5: #4b5563;
  font: 12px system-ui, sans-serif; color: var(--ink); max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { .plot { --ink: #e3e7ee; --faint: #3a4352; --paper: #14181f;
  --c0: #7fb0ff; --c1: #f5a35c; --c2: #6dd49a; --c3: #c79bf5; --c4: #f58a9b; --c5: #a3adbb; } }
.plot text { fill: var(--ink); } .plot .grid { stroke: var(--faint); } .plot .axis { stroke: var(--ink); }
.plot .line { fill: none; stroke-width: 2; } .plot .band { opacity: .18; stroke: none; }
.plot .guide { stroke: var(--ink); stroke-dasharray: 3 4; opacity: .6; } .plot .whisker { stroke: var(--ink); }
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one line, in the order drawn. `intervals` has (low, high) for each point, or nothing."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Bar:
    name: str
    value: float
    interval: tuple[float, float] | None = None


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
    """Lines with a mark at each point, told apart by colour and dashes; a band shows intervals. `diagonal` draws y = x.

    Ranges default to what the points span. Raises `ValueError` where there is no point, or one that is not above 0 on a
    logarithmic axis.
    """
    legend = _Legend([each.name for each in series] if len(series) > 1 else [])
    x = _Axis.over([p[0] for s in series for p in s.points], x_range, x_log, (_LEFT, WIDTH - _RIGHT))
    ys = [p[1] for s in series for p in s.points] + [side for s in series for pair in s.intervals for side in pair]
    y = _Axis.over(ys, y_range, y_log, (HEIGHT - _BOTTOM, _TOP + legend.height))
    parts = [legend.draw(), *_frame(x, y, x_label, y_label)]
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        parts.append(_line(x.at(low), y.at(low), x.at(high), y.at(high), "guide"))
    for number, each in enumerate(series):
        parts += _draw_series(number, each, x, y)
    return _svg(parts, title, HEIGHT)


def bar_plot(bars: Sequence[Bar], *, title: str, x_label: str, x_range: tuple[float, float] | None = None) -> str:
    """Horizontal bars, the first on top, each with its value and, where there is one, its interval as a whisker.

    The axis begins at 0 unless `x_range` says otherwise. Raises `ValueError` where there is no bar.
    """
    left = _LEFT + _CHARACTER_WIDTH * max((len(bar.name) for bar in bars), default=0) * 0.75
    values = [0.0, *(v for bar in bars for v in (bar.value, *(bar.interval or ()))), *([] if bars else [math.nan])]
    height = _TOP + _BAR_ROW * len(bars) + _BOTTOM
    x = _Axis.over(values, x_range, False, (left, WIDTH - _RIGHT - 8 * _CHARACTER_WIDTH))
    bottom = height - _BOTTOM
    parts = [_grid_x(x, _TOP, bottom), _text((x.start + x.end) / 2, height - 10, x_label, "middle")]
    for number, bar in enumerate(bars):
        middle = _TOP + _BAR_ROW * (number + 0.5)
        low, high = bar.interval or (bar.value, bar.value)
        start, end = x.at(max(x.low, 0.0)), x.at(bar.value)
        parts += [
            _text(x.start - 8, middle + 4, bar.name, "end"),
            f'<rect x="{min(start, end):.1f}" y="{middle - 8:.1f}" width="{abs(end - start):.1f}" height="16" '
            f'fill="var(--c0)"><title>{escape(bar.name)}: {_number(bar.value)}</title></rect>',
            _text(max(end, x.at(high)) + 6, middle + 4, _number(bar.value), "start"),
        ]
        if bar.interval:
            parts.append(_line(x.at(low), middle, x.at(high), middle, "whisker"))
            parts += [_line(x.at(side), middle - 4, x.at(side), middle + 4, "whisker") for side in (low, high)]
    parts.append(_line(x.at(max(x.low, 0.0)), _TOP, x.at(max(x.low, 0.0)), bottom, "axis"))
    return _svg(parts, title, height)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Values `low` to `high` laid over the pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(
        cls, values: Sequence[float], given: tuple[float, float] | None, log: bool, pixels: tuple[float, float]
    ) -> _Axis:
        low, high = given or (min(values, default=math.nan), max(values, default=math.nan))
        if not (math.isfinite(low) and math.isfinite(high)) or (log and low <= 0):
            raise ValueError("nothing to plot: no value, one that is not finite, or one below 0 on a logarithmic axis")
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        if given is None and not log:
            step = _step(low, high)
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(low=low, high=high, start=pixels[0], end=pixels[1], log=log)

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis: 1, 2 and 5 times powers of ten."""
        if not self.log:
            step = _step(self.low, self.high)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [number * step for number in range(first, last + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1,) if len(powers) > 4 else (1, 2, 5)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        return [tick for tick in ticks if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


class _Legend:
    """Names in rows over the plot, as many in a row as there is room for."""

    def __init__(self, names: Sequence[str]) -> None:
        self._places: list[tuple[float, int, str]] = []
        x, row = float(_LEFT), 0
        for name in names:
            width = 40 + _CHARACTER_WIDTH * len(name)
            if x + width > WIDTH and x > _LEFT:
                x, row = float(_LEFT), row + 1
            self._places.append((x, row, name))
            x += width
        self.height = _LEGEND_ROW * (row + 1) if names else 0

    def draw(self) -> str:
        parts = []
        for number, (x, row, name) in enumerate(self._places):
            y = _TOP + _LEGEND_ROW * row
            parts.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x + 22:.1f}" y2="{y}" class="line" {_look(number)}/>')
            parts.append(_text(x + 28, y + 4, name, "start"))
        return "".join(parts)


def _draw_series(number: int, series: Series, x: _Axis, y: _Axis) -> list[str]:
    places = [(x.at(point[0]), y.at(point[1])) for point in series.points]
    parts = []
    if series.intervals:
        around = [(place[0], y.at(low)) for place, (low, _) in zip(places, series.intervals, strict=True)]
        around += [
            (place[0], y.at(high))
            for place, (_, high) in reversed(list(zip(places, series.intervals, strict=True)))
        ]  # fmt: skip
        parts.append(f'<polygon class="band" fill="var(--c{number % 6})" points="{_points(around)}"/>')
    parts.append(f'<polyline class="line" {_look(number)} points="{_points(places)}"/>')
    for point, (at_x, at_y) in zip(series.points, places, strict=True):
        told = f"{escape(series.name)}: {_number(point[0])}, {_number(point[1])}"
        parts.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3" fill="var(--c{number % 6})"><title>{told}</title></circle>'
        )
    return parts


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> list[str]:
    middle = (y.start + y.end) / 2
    parts = [_grid_x(x, y.end, y.start)]
    for tick in y.ticks():
        parts.append(_line(x.start, y.at(tick), x.end, y.at(tick), "grid"))
        parts.append(_text(x.start - 8, y.at(tick) + 4, _number(tick), "end"))
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    parts.append(_text((x.start + x.end) / 2, y.start + 38, x_label, "middle"))
    turned = f'transform="rotate(-90 16 {middle:.1f})"'
    parts.append(f'<text x="16" y="{middle:.1f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return parts


def _grid_x(x: _Axis, top: float, bottom: float) -> str:
    return "".join(
        _line(x.at(tick), top, x.at(tick), bottom, "grid") + _text(x.at(tick), bottom + 18, _number(tick), "middle")
        for tick in x.ticks()
    )


def _svg(parts: Sequence[str], title: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="var(--paper)"/>{"".join(parts)}</svg>'
    )


def _look(number: int) -> str:
    return f'stroke="var(--c{number % 6})" stroke-dasharray="{_DASHES[number % 4]}"'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _step(low: float, high: float) -> float:
    """The round step (1, 2 or 5 times a power of ten) that cuts a range into about five."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _number(value: float) -> str:
    """Four digits at most, no exponent where it is no help, a real minus sign."""
    text = f"{value:.4g}" if value else "0"
    if "e" in text and 1e-4 < abs(value) < 1e9:
        text = f"{round(value):,}".replace(",", " ")
    return text.replace("-", "−")
