"""Draws line charts as SVG text: pure functions from numbers to markup, colours left to the page's style sheet.

A chart carries its own figures in `data-chart`, in the coordinates of the drawing, for the page's hover line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

Point = tuple[float, float]

LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 30  # margins around the plot, in the drawing's units
MAX_POINTS = 1200


class Series(NamedTuple):
    """One line: `style` is a class of the page's style sheet, which gives colour and width."""

    name: str
    points: Sequence[Point]
    style: str
    has_dots: bool = False


class Chart(NamedTuple):
    """Lines over the same horizontal axis (steps), with a level or two to compare with."""

    series: Sequence[Series]
    width: int = 460
    height: int = 210
    levels: Sequence[tuple[str, float]] = ()
    starts_at_zero: bool = True
    digits: int = 2


class Frame(NamedTuple):
    """The ranges shown, and the drawing they are shown in."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int
    height: int

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)


def render(chart: Chart) -> str:
    """Return the chart as one `<svg>` element; a sentence where there is nothing to draw."""
    series = [item._replace(points=thin_out(finite(item.points))) for item in chart.series]
    series = [item for item in series if item.points]
    if not series:
        return '<p class="empty">no figures yet</p>'
    frame = _frame(chart, series)
    parts = [
        _grid(frame, chart.digits),
        *(_level(frame, name, value) for name, value in chart.levels),
        *(_line(frame, item) for item in series),
        f'<line class="cursor" y1="{TOP}" y2="{frame.height - BOTTOM}"/>',
    ]
    data = escape(json.dumps(_hover_data(frame, series, chart.digits), separators=(",", ":")))
    label = escape(", ".join(item.name for item in series))
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{label}" data-chart="{data}">'
        + "".join(parts)
        + "</svg>"
    )


def finite(points: Sequence[tuple[float, float | None]]) -> list[Point]:
    """Drop points without a number."""
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def thin_out(points: Sequence[Point]) -> list[Point]:
    """Return at most `MAX_POINTS` points, evenly chosen, the last one always among them."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return list(points) if stride <= 1 else [*points[:-1:stride], points[-1]]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Return the running mean over the `window` points around each (fewer at the ends)."""
    half = window // 2
    means = []
    for index, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, index - half) : index + half + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers between `low` and `high`: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(chart: Chart, series: list[Series]) -> Frame:
    xs = [x for item in series for x, _ in item.points]
    ys = [y for item in series for _, y in item.points] + [value for _, value in chart.levels]
    starts_at_zero = chart.starts_at_zero and min(ys) >= 0
    low, high = (0.0 if starts_at_zero else min(ys)), max(ys)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    y_range = (low if starts_at_zero else low - margin, high + margin)
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    return Frame(x_range, y_range, chart.width, chart.height)


def _grid(frame: Frame, digits: int) -> str:
    parts = []
    for value in ticks(*frame.y_range, count=frame.height // 55):
        y = round(frame.y(value), 1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{frame.width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{_short(value, digits)}</text>')
    for value in ticks(*frame.x_range, count=frame.width // 90):
        x = round(frame.x(value), 1)
        parts.append(
            f'<text class="tick" x="{x}" y="{frame.height - 8}" text-anchor="middle">{_short(value, 0)}</text>'
        )
    parts.append(f'<text class="tick" x="{LEFT - 8}" y="{frame.height - 8}" text-anchor="end">step</text>')
    return "".join(parts)


def _level(frame: Frame, name: str, value: float) -> str:
    y, right = round(frame.y(value), 1), frame.width - RIGHT
    label = escape(f"{name} {value:.2f}")
    return (
        f'<line class="level" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        f'<text class="level-name" x="{right}" y="{y - 6}" text-anchor="end">{label}</text>'
    )


def _line(frame: Frame, series: Series) -> str:
    places = [(round(frame.x(x), 1), round(frame.y(y), 1)) for x, y in series.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    dots = "".join(f'<circle class="{series.style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places)
    return f'<path class="{series.style}" d="{path}"/>' + (dots if series.has_dots or len(places) == 1 else "")


def _hover_data(frame: Frame, series: list[Series], digits: int) -> dict[str, Any]:
    return {
        "digits": digits,
        "series": [
            {
                "name": item.name,
                "style": item.style,
                "points": [[round(frame.x(x), 1), x, round(y, 4)] for x, y in item.points],
            }
            for item in series
        ],
    }


def _short(value: float, digits: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.1f}".rstrip("0").rstrip(".") + letter
    text = f"{value:.{digits}f}" if digits else f"{value:g}"
    return text.rstrip("0").rstrip(".") if "." in text else text
