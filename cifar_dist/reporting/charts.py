"""Draw SVG charts for the page; colors are the page's CSS classes, and names are escaped.

No plotting library is used: the page has some 100 kB instead of 5 MB, follows the light or dark
theme, prints, and needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLORS = 8  # CSS classes c0 to c7; further groups get another dash pattern
MAX_POINTS = 80  # per line
MARKED_POINTS = 15  # lines with at most this many points get a marker at each
LETTER_WIDTH = 6.4  # mean width of a letter of 12 px
LOG_SPAN = 20  # largest / smallest value above which an axis is logarithmic
LABEL_DISTANCE = 16  # between the labels at the lines' ends

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The size of a chart and the margins of its axes, in pixels."""

    width: float = 460
    height: float = 270
    left: float = 48
    right: float = 20
    top: float = 30
    bottom: float = 42

    @property
    def end_label_letters(self) -> int:
        """How many letters of a label fit into the right margin; 0: no labels."""
        return max(0, int((self.right - 24) / LETTER_WIDTH))


SMALL = Frame()
LOW = Frame(height=210)
WIDE = Frame(width=1240, height=380, right=230)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart, with a band around it; series of the same group share a color."""

    name: str
    group: int
    points: Sequence[Point]
    band: Sequence[tuple[float, float]] = ()  # lowest and highest y of each point
    is_finished: bool = True  # otherwise the line is dotted
    is_training: bool = False  # of the training images: a thin line

    @property
    def style(self) -> str:
        dash = self.group // COLORS % 3 if self.is_finished else 2
        styles = [f"c{self.group % COLORS}", f"dash{dash}" if dash else "", "thin"]
        return " ".join(filter(None, styles if self.is_training else styles[:2]))


def ticks(low: float, high: float, wanted: int = 5, *, whole: bool = False) -> list[float]:
    """Return about `wanted` round (or whole) numbers that span `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = max(span / wanted, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Return a short decimal: 0.001, 0.25, 12, 1,200."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most MAX_POINTS evenly spaced points, including the first and the last."""
    if len(points) <= MAX_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(index * last / (MAX_POINTS - 1))] for index in range(MAX_POINTS)]


def shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def svg(body: Iterable[str], *, frame: Frame, label: str, style: str = "chart") -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" class="{style}" '
        f'aria-label="{escape(label)}" preserveAspectRatio="xMidYMid meet">{"".join(body)}</svg>'
    )


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Map data values to coordinates."""

    frame: Frame
    x: Sequence[float]  # ticks, ascending
    y: Sequence[float]

    def to_pixels(self, point: Point) -> Point:
        frame = self.frame
        x = (point[0] - self.x[0]) / (self.x[-1] - self.x[0])
        y = (point[1] - self.y[0]) / (self.y[-1] - self.y[0])
        width = frame.width - frame.left - frame.right
        height = frame.height - frame.top - frame.bottom
        return frame.left + x * width, frame.height - frame.bottom - y * height

    def draw(
        self, *, x_label: str, y_label: str, x_texts: Sequence[str] | None = None
    ) -> list[str]:
        left, bottom = self.to_pixels((self.x[0], self.y[0]))
        right, top = self.to_pixels((self.x[-1], self.y[-1]))
        parts = []
        for value in self.y:
            _, y = self.to_pixels((self.x[0], value))
            parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
            parts.append(
                f'<text class="tick end" x="{left - 6:.1f}" y="{y + 4:.1f}">{number(value)}</text>'
            )
        texts = x_texts or [number(value) for value in self.x]
        for value, text in zip(self.x, texts, strict=True):
            x, _ = self.to_pixels((value, self.y[0]))
            parts.append(
                f'<text class="tick mid" x="{x:.1f}" y="{bottom + 17:.1f}">{escape(text)}</text>'
            )
        parts.append(f'<path class="axis" d="M{left:.1f} {bottom:.1f}H{right:.1f}"/>')
        middle, below = (left + right) / 2, self.frame.height - 6
        parts.append(
            f'<text class="label mid" x="{middle:.1f}" y="{below}">{escape(x_label)}</text>'
        )
        parts.append(
            f'<text class="label" x="{left - 40:.1f}" y="{top - 14}">{escape(y_label)}</text>'
        )
        return parts


def path(pixels: Iterable[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in pixels)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    frame: Frame = SMALL,
    style: str = "chart",
    same_axes_as: Sequence[Series] = (),
) -> Markup | None:
    """Draw lines over whole epochs or steps; None if there are no points.

    The axes span the points of `same_axes_as` as well. A frame with room at the right has the lines' names there and a tooltip for each point.
    """
    series = [line for line in series if line.points]
    if not series:
        return None
    lines = [*series, *same_axes_as]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    ys += [y for line in lines for pair in line.band for y in pair]
    axes = Axes(
        frame=frame,
        x=ticks(min(xs), max(xs), 10 if frame.width > SMALL.width else 5, whole=True),
        y=ticks(min(ys), max(ys)),
    )
    parts = axes.draw(x_label=x_label, y_label=y_label)
    for line in series:
        if line.band:
            ends = list(zip(line.points, line.band, strict=True))
            lower = thinned([(x, low) for (x, _), (low, _) in ends])
            upper = thinned([(x, high) for (x, _), (_, high) in ends])
            outline = map(axes.to_pixels, [*lower, *reversed(upper)])
            parts.append(f'<path class="band {line.style}" d="{path(outline)}Z"/>')
    for line in series:
        points = thinned(line.points)
        parts.append(f'<path class="line {line.style}" d="{path(map(axes.to_pixels, points))}"/>')
        parts += markers(line, points, axes, x_label=x_label)
    if frame.end_label_letters:
        parts += end_labels(series, axes)
    return svg(parts, frame=frame, label=f"{y_label} over {x_label}", style=style)


def markers(line: Series, points: Sequence[Point], axes: Axes, *, x_label: str) -> Iterable[str]:
    """Yield circles: visible for few points; with tooltips where the chart has labels."""
    is_visible = len(points) <= MARKED_POINTS
    has_tips = axes.frame.end_label_letters > 0
    if not (is_visible or has_tips):
        return
    style = f"dot {line.style}" if is_visible else f"dot tip {line.style}"
    for x, y in points:
        cx, cy = axes.to_pixels((x, y))
        tip = f"{escape(line.name)}: {number(y)} at {escape(x_label)} {number(x)}"
        title = f"<title>{tip}</title>" if has_tips else ""
        yield f'<circle class="{style}" cx="{cx:.1f}" cy="{cy:.1f}" r="3">{title}</circle>'


def end_labels(series: Sequence[Series], axes: Axes) -> Iterable[str]:
    """Yield the name of each line at the height of its last point, moved so that none overlap.

    If there are too many lines, the highest ones get a name.
    """
    frame = axes.frame
    room = int((frame.height - frame.top - frame.bottom) / LABEL_DISTANCE) + 1
    ends = sorted(
        ((axes.to_pixels(line.points[-1]), line) for line in series), key=lambda end: end[0][1]
    )[:room]
    heights: list[float] = []
    for (_, y), _ in ends:  # from the top
        heights.append(max(y, heights[-1] + LABEL_DISTANCE) if heights else y)
    limit = frame.height - frame.bottom
    for index in reversed(range(len(heights))):  # push up what is below the axis
        heights[index] = min(heights[index], limit)
        limit = heights[index] - LABEL_DISTANCE
    for ((x, y), line), height in zip(ends, heights, strict=True):
        right = frame.width - frame.right + 14
        parts = f'<path class="leader {line.style}" d="M{x + 4:.1f} {y:.1f}L{right - 3:.1f} {height:.1f}"/>'
        name = escape(shortened(line.name, frame.end_label_letters))
        yield f'{parts}<text class="name {line.style}" x="{right:.1f}" y="{height + 4:.1f}">{name}</text>'


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point of a scatter chart."""

    x: float
    y: float
    tip: str
    style: str
    is_finished: bool


def scatter_chart(
    dots: Sequence[Dot], *, x_label: str, y_label: str, names: Sequence[str] = ()
) -> Markup:
    """Draw dots, hollow if not finished; `names` are the ticks at x = 0, 1, ...

    Without names, the x axis is logarithmic if the values span more than LOG_SPAN.
    """
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    is_log = not names and min(xs) > 0 and max(xs) / min(xs) > LOG_SPAN
    to_axis = math.log10 if is_log else float
    if names:
        x_ticks: list[float] = [-0.5, *range(len(names)), len(names) - 0.5]
        texts = ["", *(shortened(name, 70 // len(names)) for name in names), ""]
    elif is_log:
        first, last = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
        x_ticks = [float(power) for power in range(first, last + 1)]
        texts = [f"{10.0**power:g}" for power in x_ticks]
    else:
        x_ticks = ticks(min(xs), max(xs))
        texts = [number(value) for value in x_ticks]
    axes = Axes(frame=SMALL, x=x_ticks, y=ticks(min(ys), max(ys)))
    parts = axes.draw(x_label=x_label, y_label=y_label, x_texts=texts)
    for dot in sorted(dots, key=lambda dot: dot.is_finished):  # the finished ones on top
        x, y = axes.to_pixels((to_axis(dot.x), dot.y))
        style = f"{'dot' if dot.is_finished else 'ring'} {dot.style}"
        parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{escape(dot.tip)}</title></circle>"
        )
    return svg(parts, frame=SMALL, label=f"{y_label} over {x_label}")


def reliability_chart(
    lines: Sequence[tuple[str, Sequence[float | None]]], counts: Sequence[int], label: str
) -> Markup:
    """Draw accuracy over confidence for several calibrations, above a histogram of the confidences.

    Each line is a name and the accuracy of each bin in percent, None for a bin that is not drawn; a
    calibrated model is on the diagonal. `counts` are the images of each bin of the first line.
    """
    frame = Frame(width=520, height=360, bottom=110)
    axes = Axes(frame=frame, x=[0, 20, 40, 60, 80, 100], y=[0, 20, 40, 60, 80, 100])
    parts = axes.draw(x_label="confidence, %", y_label="correct, %")
    diagonal = path([axes.to_pixels((0, 0)), axes.to_pixels((100, 100))])
    parts.append(f'<path class="diagonal" d="{diagonal}"/>')
    width, most = 100 / len(counts), max(counts)
    base, height = frame.height - 28, 42
    for index, count in enumerate(counts):
        (x, _), (end, _) = (axes.to_pixels((width * edge, 0)) for edge in (index, index + 1))
        bar = height * count / most
        parts.append(
            f'<rect class="bar" x="{x + 1:.1f}" y="{base - bar:.1f}" width="{end - x - 2:.1f}" '
            f'height="{bar:.1f}"><title>{count:,} images</title></rect>'
        )
    for group, (name, top1) in enumerate(lines):
        points = [
            axes.to_pixels(((index + 0.5) * width, correct))
            for index, correct in enumerate(top1)
            if correct is not None
        ]
        parts.append(f'<path class="line c{group}" d="{path(points)}"/>')
        parts += [
            f'<circle class="dot c{group}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points
        ]
        parts.append(
            f'<text class="name c{group}" x="{frame.left + 12}" y="{frame.top + 14 + 18 * group}">'
            f"{escape(name)}</text>"
        )
    return svg(parts, frame=frame, label=label)
