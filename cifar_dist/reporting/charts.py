"""Draw SVG charts for the page; colors are the page's CSS classes, and names are escaped.

No plotting library is used: the page has some 100 kB instead of 5 MB, follows the light or dark
theme, prints, and needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from torch import Tensor

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 30, 42
COLORS = 8  # CSS classes c0 to c7; further groups get another dash pattern
MAX_POINTS = 120  # per line
HEAT_LEVELS = 6

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart; series of the same group share a color."""

    name: str
    group: int
    points: Sequence[Point]

    @property
    def style(self) -> str:
        dash = self.group // COLORS % 3
        return f"c{self.group % COLORS}" + (f" dash{dash}" if dash else "")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about `wanted` round numbers that span `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Return a short decimal: 0.001, 0.25, 12, 1,200."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most MAX_POINTS evenly spaced points, including the first and the last."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(index * last / (MAX_POINTS - 1))] for index in range(MAX_POINTS)]


def svg(body: Iterable[str], *, width: float, height: float, label: str, style: str = "") -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" class="{style}" '
        f'aria-label="{escape(label)}" preserveAspectRatio="xMidYMid meet">{"".join(body)}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Map data values to coordinates."""

    x: Sequence[float]  # ticks, ascending
    y: Sequence[float]

    def to_pixels(self, point: Point) -> Point:
        x = (point[0] - self.x[0]) / (self.x[-1] - self.x[0])
        y = (point[1] - self.y[0]) / (self.y[-1] - self.y[0])
        width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + x * width, HEIGHT - BOTTOM - y * height

    def draw(self, *, x_label: str, y_label: str) -> list[str]:
        left, bottom = self.to_pixels((self.x[0], self.y[0]))
        right, top = self.to_pixels((self.x[-1], self.y[-1]))
        parts = []
        for value in self.y:
            _, y = self.to_pixels((self.x[0], value))
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            parts.append(
                f'<text class="tick end" x="{left - 6:.1f}" y="{y + 4:.1f}">{number(value)}</text>'
            )
        for value in self.x:
            x, _ = self.to_pixels((value, self.y[0]))
            parts.append(
                f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17:.1f}">{number(value)}</text>'
            )
        parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        middle = (left + right) / 2
        parts.append(
            f'<text class="label mid" x="{middle:.1f}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
        )
        parts.append(
            f'<text class="label" x="{left - 40:.1f}" y="{top - 14}">{escape(y_label)}</text>'
        )
        return parts


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str) -> Markup | None:
    """Draw lines over a common x axis, with a tooltip per point; None if there are no points."""
    points = [point for line in series for point in line.points]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    axes = Axes(x=ticks(min(xs), max(xs)), y=ticks(min(ys), max(ys)))
    parts = axes.draw(x_label=x_label, y_label=y_label)
    for line in series:
        line_points = thinned(line.points)
        if not line_points:
            continue
        pixels = [axes.to_pixels(point) for point in line_points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)
        parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        for (x, y), (x_value, y_value) in zip(pixels, line_points, strict=True):
            tip = f"{escape(line.name)}: {number(y_value)} at {escape(x_label)} {number(x_value)}"
            parts.append(
                f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
                f"<title>{tip}</title></circle>"
            )
    return svg(parts, width=WIDTH, height=HEIGHT, label=f"{y_label} over {x_label}", style="chart")


def reliability_chart(counts: Sequence[int], top1: Sequence[float | None], label: str) -> Markup:
    """Draw the accuracy per confidence bin; a calibrated model is on the diagonal.

    Darker bars contain more images.
    """
    axes = Axes(x=[0, 20, 40, 60, 80, 100], y=[0, 20, 40, 60, 80, 100])
    parts = axes.draw(x_label="confidence, %", y_label="correct, %")
    width, most = 100 / len(counts), max(counts)
    for index, (count, correct) in enumerate(zip(counts, top1, strict=True)):
        if correct is None:
            continue
        x, y = axes.to_pixels((index * width, correct))
        end, bottom = axes.to_pixels(((index + 1) * width, 0))
        level = max(1, math.ceil(HEAT_LEVELS * math.sqrt(count / most)))
        tip = f"{count:,} images, {correct:.1f} % correct"
        parts.append(
            f'<rect class="bar h{level}" x="{x + 1:.1f}" y="{y:.1f}" width="{end - x - 2:.1f}" '
            f'height="{bottom - y:.1f}"><title>{tip}</title></rect>'
        )
    (x0, y0), (x1, y1) = axes.to_pixels((0, 0)), axes.to_pixels((100, 100))
    parts.append(f'<path class="diagonal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    return svg(parts, width=WIDTH, height=HEIGHT, label=label, style="chart")


def cell_style(count: int, most: int, *, correct: bool) -> str:
    """Return the CSS classes of a cell; the square root keeps rare mistakes visible."""
    return f"{'correct' if correct else 'heat'} h{math.ceil(HEAT_LEVELS * math.sqrt(count / most))}"


def small_heat_map(table: Tensor, names: Sequence[str], label: str) -> Markup:
    """Draw a confusion matrix, int64 [G, G], of a few named classes; correct predictions are gray."""
    size, cell = len(table), 18
    margin = 14 + 7.4 * max(len(name) for name in names)  # the width of 12.5 px letters
    rows = table.tolist()
    most = max((rows[i][j] for i in range(size) for j in range(size) if i != j), default=0)
    parts = []
    for i, name in enumerate(names):
        y = margin + i * cell
        parts.append(f'<text class="name end" x="{margin - 6}" y="{y + 13}">{escape(name)}</text>')
        parts.append(
            f'<text class="name" transform="translate({margin + i * cell + 13} {margin - 6}) '
            f'rotate(-90)">{escape(name)}</text>'
        )
        for j, count in enumerate(rows[i]):
            if not count:
                continue
            style = cell_style(count, sum(rows[i]) if i == j else most, correct=i == j)
            tip = f"{count:,} of {escape(name)} predicted as {escape(names[j])}"
            parts.append(
                f'<rect class="{style}" x="{margin + j * cell}" y="{y}" width="{cell - 1}" '
                f'height="{cell - 1}"><title>{tip}</title></rect>'
            )
    side = margin + size * cell
    return svg(parts, width=side, height=side, label=label, style="map")


def large_heat_map(table: Tensor, groups: Sequence[int], label: str) -> Markup:
    """Draw a confusion matrix, int64 [C, C], ordered by group, with a frame around each group.

    Cells of the same color are one path, which keeps 10,000 cells small.
    """
    size, cell = len(table), 5
    order = sorted(range(size), key=lambda index: (groups[index], index))
    rows = table[order][:, order].tolist()
    most = max((rows[i][j] for i in range(size) for j in range(size) if i != j), default=0)
    paths: dict[str, list[str]] = {}
    for i in range(size):
        for j, count in enumerate(rows[i]):
            if not count:
                continue
            style = cell_style(count, sum(rows[i]) if i == j else most, correct=i == j)
            paths.setdefault(style, []).append(f"M{j * cell} {i * cell}h{cell}v{cell}h-{cell}z")
    side = size * cell
    parts = [f'<rect class="background" width="{side}" height="{side}"/>']
    parts += [f'<path class="{style}" d="{"".join(cells)}"/>' for style, cells in paths.items()]
    first = 0
    for group in dict.fromkeys(groups[index] for index in order):
        count = sum(1 for index in order if groups[index] == group)
        start, width = first * cell, count * cell
        parts.append(
            f'<rect class="frame" x="{start}" y="{start}" width="{width}" height="{width}"/>'
        )
        first += count
    return svg(parts, width=side, height=side, label=label, style="map")
