"""Plot the results of all recipes on one axis; the page draws it in HTML, which adapts to its width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cifar_dist.reporting.charts import number, ticks
from cifar_dist.reporting.comparison import mean_std
from cifar_dist.reporting.entries import Entry


@dataclass(frozen=True, kw_only=True)
class DotRow:
    """A row of the plot of all results; positions are percentages of the axis."""

    name: str
    text: str
    color: str
    mean: float
    seeds: tuple[float, ...] = ()
    span: tuple[float, float] | None = None
    over: str = ""


@dataclass(frozen=True, kw_only=True)
class DotPlot:
    ticks: list[tuple[float, str]]  # position, text
    rows: list[DotRow]
    has_references: bool

    @property
    def legend(self) -> str:
        """What the marks mean."""
        has_seeds = any(len(row.seeds) > 1 for row in self.rows)
        marks = ["Dot: mean; circles: seeds" if has_seeds else "Dot: result"]
        over = {row.over for row in self.rows}
        if "seeds" in over:
            marks.append("solid line: 95 % interval over the seeds (Student's t)")
        if "test images" in over:
            marks.append("dashed line: 95 % interval over the test images (bootstrap)")
        text = "; ".join(marks) + "."
        return (
            f"{text} Their networks and training lengths differ." if self.has_references else text
        )


def dot_plot(entries: Sequence[Entry], references: Sequence[tuple[str, float]]) -> DotPlot | None:
    """Return all results in descending order, with those of others for a single recipe."""
    results = [
        (entry, entry.group, mean, entry.group.top1_interval)
        for entry in entries
        if entry.group and (mean := entry.group.mean("top1")) is not None
    ]
    if len(results) > 1:
        references = ()
    if not results or len(results) + len(references) < 2:
        return None
    ends = [value for _, value in references]
    for _, group, mean, interval in results:
        ends += [mean, *group.values("top1"), *((interval.low, interval.high) if interval else ())]
    axis = ticks(min(ends), max(ends))

    def position(value: float) -> float:
        return 100 * (value - axis[0]) / (axis[-1] - axis[0])

    rows = [
        (
            mean,
            DotRow(
                name=entry.label,
                text=f"{mean_std(group, 'top1')} %",
                color=entry.color,
                mean=position(mean),
                seeds=tuple(position(value) for value in group.values("top1")),
                span=(position(interval.low), position(interval.high)) if interval else None,
                over=interval.over if interval else "",
            ),
        )
        for entry, group, mean, interval in results
    ]
    rows += [
        (
            value,
            DotRow(name=name, text=f"{number(value)} %", color="reference", mean=position(value)),
        )
        for name, value in references
    ]
    return DotPlot(
        ticks=[(position(value), number(value)) for value in axis],
        rows=[row for _, row in sorted(rows, key=lambda pair: -pair[0])],
        has_references=bool(references),
    )
