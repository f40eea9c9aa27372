"""Floor 5. Numbers -> SVG, as text for the page; colours are the page's CSS classes, names are escaped.

Drawn here rather than by a plotting library: a page of some 100 kB instead of 5 MB, that follows the
reader's light or dark theme, prints, and needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from torch import Tensor

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 30, 42
COLORS = 8  # classes c0 ... c7 of the page; more series get another dash
MAX_POINTS = 120  # of a line; more are thinned out evenly
HEAT_LEVELS = 6

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line; series of one group share a colour."""

    name: str
    group: int
    points: Sequence[Point]

    @property
    def style(self) -> str:
        dash = self.group // COLORS % 3
        return f"c{self.group % COLORS}" + (f" dash{dash}" if dash else "")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A short decimal: 0.001, 0.25, 12, 1,200."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS of them, first and last included."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(place * last / (MAX_POINTS - 1))] for place in range(MAX_POINTS)]


def svg(body: Iterable[str], *, width: float, height: float, label: str, style: str = "") -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" class="{style}" '
        f'aria-label="{escape(label)}" preserveAspectRatio="xMidYMid meet">{"".join(body)}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class Axes:
    """From numbers to places in the picture."""

    x: Sequence[float]  # ticks, ascending
    y: Sequence[float]

    def place(self, point: Point) -> Point:
        right = (point[0] - self.x[0]) / (self.x[-1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[-1] - self.y[0])
        across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + right * across, HEIGHT - BOTTOM - up * down

    def draw(self, *, x_label: str, y_label: str) -> list[str]:
        left, bottom = self.place((self.x[0], self.y[0]))
        right, top = self.place((self.x[-1], self.y[-1]))
        parts = []
        for value in self.y:
            _, y = self.place((self.x[0], value))
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            parts.append(
                f'<text class="tick end" x="{left - 6:.1f}" y="{y + 4:.1f}">{number(value)}</text>'
            )
        for value in self.x:
            x, _ = self.place((value, self.y[0]))
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
    """Lines over a common x, with a tooltip at each point; None where there is no point."""
    points = [point for one in series for point in one.points]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    axes = Axes(x=ticks(min(xs), max(xs)), y=ticks(min(ys), max(ys)))
    parts = axes.draw(x_label=x_label, y_label=y_label)
    for one in series:
        shown = thinned(one.points)
        if not shown:
            continue
        places = [axes.place(point) for point in shown]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line {one.style}" d="M{path}"/>')
        for (x, y), (at, value) in zip(places, shown, strict=True):
            tip = f"{escape(one.name)}: {number(value)} at {escape(x_label)} {number(at)}"
            parts.append(
                f'<circle class="dot {one.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
                f"<title>{tip}</title></circle>"
            )
    return svg(parts, width=WIDTH, height=HEIGHT, label=f"{y_label} over {x_label}", style="chart")


def reliability_chart(counts: Sequence[int], top1: Sequence[float | None], label: str) -> Markup:
    """Bars of how right a model is where it is how sure; on the diagonal it is calibrated.

    The fuller a bar's colour, the more pictures are in its bin.
    """
    axes = Axes(x=[0, 20, 40, 60, 80, 100], y=[0, 20, 40, 60, 80, 100])
    parts = axes.draw(x_label="confidence, %", y_label="right, %")
    width, most = 100 / len(counts), max(counts)
    for place, (count, right) in enumerate(zip(counts, top1, strict=True)):
        if right is None:
            continue
        x, y = axes.place((place * width, right))
        end, bottom = axes.place(((place + 1) * width, 0))
        level = max(1, math.ceil(HEAT_LEVELS * math.sqrt(count / most)))
        tip = f"{count:,} pictures, {right:.1f} % right"
        parts.append(
            f'<rect class="bar h{level}" x="{x + 1:.1f}" y="{y:.1f}" width="{end - x - 2:.1f}" '
            f'height="{bottom - y:.1f}"><title>{tip}</title></rect>'
        )
    (x0, y0), (x1, y1) = axes.place((0, 0)), axes.place((100, 100))
    parts.append(f'<path class="diagonal" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>')
    return svg(parts, width=WIDTH, height=HEIGHT, label=label, style="chart")


def cell_style(count: int, most: int, *, correct: bool) -> str:
    """The classes of a cell; by the root, so that rare mistakes are seen beside frequent ones."""
    return f"{'right' if correct else 'heat'} h{math.ceil(HEAT_LEVELS * math.sqrt(count / most))}"


def small_heat_map(table: Tensor, names: Sequence[str], label: str) -> Markup:
    """A confusion of a few named classes, int64 [G, G]: errors in colour, right answers grey."""
    size, cell = len(table), 18
    margin = 14 + 7.4 * max(len(name) for name in names)  # as wide as 12.5 px letters are
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
            tip = f"{count:,} of {escape(name)} taken for {escape(names[j])}"
            parts.append(
                f'<rect class="{style}" x="{margin + j * cell}" y="{y}" width="{cell - 1}" '
                f'height="{cell - 1}"><title>{tip}</title></rect>'
            )
    side = margin + size * cell
    return svg(parts, width=side, height=side, label=label, style="map")


def large_heat_map(table: Tensor, groups: Sequence[int], label: str) -> Markup:
    """A confusion of many classes, int64 [C, C], ordered by group, a frame around each group.

    One path for each level of colour, so that 10,000 cells are small.
    """
    size, cell = len(table), 5
    order = sorted(range(size), key=lambda place: (groups[place], place))
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
    parts = [f'<rect class="sheet" width="{side}" height="{side}"/>']
    parts += [f'<path class="{style}" d="{"".join(cells)}"/>' for style, cells in paths.items()]
    first = 0
    for group in dict.fromkeys(groups[place] for place in order):
        count = sum(1 for place in order if groups[place] == group)
        at, wide = first * cell, count * cell
        parts.append(f'<rect class="frame" x="{at}" y="{at}" width="{wide}" height="{wide}"/>')
        first += count
    return svg(parts, width=side, height=side, label=label, style="map")
