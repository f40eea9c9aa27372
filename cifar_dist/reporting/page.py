"""Render runs as one HTML page without scripts or external resources."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cifar_dist import __version__
from cifar_dist.data.dataset import DIGEST, no_data_error
from cifar_dist.inference.stored_run import Run
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.recipe.runs import CIFAR_100, training_data
from cifar_dist.reporting.charts import (
    COLORS,
    LOW,
    SMALL,
    WIDE,
    Frame,
    Series,
    line_chart,
    number,
    ticks,
)
from cifar_dist.reporting.comparison import (
    Group,
    Interval,
    group_runs,
    mean_std,
    paired_tests,
    summarize_pairs,
)
from cifar_dist.reporting.details import Details, run_details
from cifar_dist.reporting.parameters import parameter_charts
from cifar_dist.reporting.reproduce import reproduce
from cifar_dist.reporting.tutorial import compare_with_published
from cifar_dist.run_folder.evaluations import same_data
from cifar_dist.utils.log import log, progress_bar

TEST_TOP1 = ("eval", "top1", "test top-1, %")
OTHER_CURVES = (  # axis label, and the (kind of record, key) pairs of its lines
    ("loss: test (bold) and training (thin)", (("eval", "loss"), ("train", "loss"))),
    (
        "top-1, %: validation (bold) and training (thin)",
        (("eval", "val_top1"), ("train", "top1")),
    ),
    ("learning rate", (("train", "lr"),)),
)
WIDE_CARD = Frame(width=860, height=300)
MAX_CARDS = 6  # with more recipes, the plot of all results replaces the cards
REFERENCES = (  # top-1 on CIFAR-100 that others report
    ("ResNet-18, 200 epochs, best test epoch (DocsaidLab/cifar100-training-demo)", 44.26),
    ("ResNet-18 with 3x3 stem, 200 epochs (Westlake-AI/openmixup)", 76.42),
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A recipe with finished runs, or an unfinished run: a color, a card and a line of the page."""

    label: str
    index: int  # of its color
    runs: tuple[Run, ...]
    group: Group | None  # None: not finished

    @property
    def color(self) -> str:
        return f"c{self.index % COLORS}"

    @property
    def name(self) -> str:
        return self.label if self.group else f"{self.label} (not finished)"

    @property
    def anchor(self) -> str:
        return f"recipe-{self.index}"

    @property
    def last_epoch(self) -> float:
        """Epochs trained up to the last record of an unfinished run."""
        return max((record["epoch"] for record in self.runs[0].records), default=0.0)

    @property
    def last_top1(self) -> float | None:
        """Test top-1 of an unfinished run's last evaluation, percent."""
        values = [y for _, y in points_of(self.runs[0], "eval", "top1")]
        return values[-1] if values else None

    def chart(
        self, frame: Frame, style: str = "chart", same_axes_as: Sequence[Entry] = ()
    ) -> Markup | None:
        """Draw test top-1, with the axes of other entries."""
        kind, key, label = TEST_TOP1
        return line_chart(
            [series(self, kind, key)],
            x_label="epoch",
            y_label=label,
            frame=frame,
            style=style,
            same_axes_as=[series(entry, kind, key) for entry in same_axes_as],
        )


def points_of(run: Run, kind: str, key: str) -> list[tuple[float, float]]:
    return [
        (record["epoch"], record[key])
        for record in run.records
        if record["kind"] == kind and isinstance(record.get(key), int | float)
    ]


def series(entry: Entry, kind: str, key: str) -> Series:
    """Return the mean over the seeds where all have a value, with a band from lowest to highest."""
    lines = [dict(points_of(run, kind, key)) for run in entry.runs]
    values = {x: [line[x] for line in lines] for x in lines[0] if all(x in line for line in lines)}
    return Series(
        name=entry.name,
        group=entry.index,
        points=[(x, sum(ys) / len(ys)) for x, ys in values.items()],
        band=[(min(ys), max(ys)) for ys in values.values()] if len(lines) > 1 else (),
        is_finished=entry.group is not None,
        is_training=kind == "train" and key != "lr",
    )


def curve_charts(entries: Sequence[Entry]) -> list[Markup]:
    """Return the small charts."""
    charts = [
        line_chart(
            [series(entry, kind, key) for entry in entries for kind, key in lines],
            x_label="epoch",
            y_label=label,
        )
        for label, lines in OTHER_CURVES
    ]
    return [chart for chart in charts if chart is not None]


def top1_charts(entries: Sequence[Entry]) -> list[Markup]:
    """Return the chart of test top-1 for wide and for narrow screens, or nothing."""
    kind, key, label = TEST_TOP1
    lines = [series(entry, kind, key) for entry in entries]
    charts = [
        line_chart(lines, x_label="epoch", y_label=label, frame=frame, style=f"chart {style}")
        for frame, style in ((WIDE, "wide"), (SMALL, "narrow"))
    ]
    return [chart for chart in charts if chart is not None]


# ----------------------------------------------------------------------------- results


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
        over = {row.over for row in self.rows if row.span}
        meaning = " or ".join(
            text
            for name, text in (
                ("seeds", "solid over the seeds (Student's t)"),
                ("test images", "dashed over the test images (bootstrap)"),
            )
            if name in over
        )
        marks = ["Dot: mean" if any(len(row.seeds) > 1 for row in self.rows) else "Dot: result"]
        if any(len(row.seeds) > 1 for row in self.rows):
            marks.append("circles: seeds")
        if meaning:
            marks.append(f"line: 95 % interval, {meaning}")
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


def describe_interval(interval: Interval) -> str:
    """Return like `95 % interval 43.30 to 45.22 over the seeds`."""
    text = f"95 % interval {interval.low:.2f} to {interval.high:.2f} over the {interval.over}"
    return text if interval.over == "seeds" else f"{text}, without the influence of the seed"


def describe_network(model: ModelConfig) -> str:
    """Return like `resnet18 at 32 px` or `resnet50 at 224 px, pretrained`."""
    start = ", pretrained" if model.pretrained else ", from given weights" if model.weights else ""
    return f"{model.backbone} at {model.image_size} px{start}"


def facts(entry: Entry, data: Path | None) -> dict[str, str]:
    """Return what was trained where: network, data, length, batch, optimizer, precision, hardware."""
    run, recipe = entry.runs[0], entry.runs[0].recipe
    hardware = {str(one.environment.get("hardware") or "unknown hardware") for one in entry.runs}
    processes = run.summary.get("world_size") or run.environment.get("world_size") or 1
    parts = run.summary.get("micro_batches") or recipe.run.micro_batches
    epochs = entry.group.mean("epochs") if entry.group else recipe.run.epochs
    unit = ("GPU", "GPUs") if run.environment.get("device") == "cuda" else ("process", "processes")
    values = {
        "network": describe_network(recipe.model),
        "data": training_data(recipe, run.environment, data or Path(recipe.data.path)),
        "epochs": f"{number(epochs or 0)} epoch{'s' if epochs != 1 else ''}",
        "batch": f"batch size {recipe.run.batch_size}"
        + (f" in {parts} micro-batches" if parts and parts > 1 else ""),
        "optimizer": f"{recipe.optim.name}, lr {recipe.optim.lr:g}",
        "precision": recipe.run.precision,
        "hardware": f"{', '.join(sorted(hardware))}, {processes} {unit[processes != 1]}",
    }
    if recipe.averaging:
        values["averaging"] = f"evaluated with averaged weights ({recipe.averaging.kind})"
    return values


def find_data(run: Run, data: Path | None) -> tuple[Path, str | None]:
    """Return the folder of the run's data, and what is wrong with it or None."""
    path = data or Path(run.recipe.data.path)
    if not (path / DIGEST).exists():
        return path, str(no_data_error(path))
    if not same_data(run.environment, path):
        return path, f"{path} is other data; give the folder of the run's data with --data FOLDER"
    return path, None


def all_details(
    entries: Sequence[Entry], data: Path | None
) -> tuple[list[tuple[Entry, Details]], list[str]]:
    """Return the details of each recipe's first run with predictions, and what could not be read."""
    details: list[tuple[Entry, Details]] = []
    without_data: dict[str, list[str]] = {}  # labels by reason
    bar = progress_bar(0, len(entries), enabled=True, unit="recipe")
    for entry in entries:
        run = next((run for run in entry.runs if run.predictions is not None), None)
        if entry.group and run is not None:
            path, problem = find_data(run, data)
            if problem:
                without_data.setdefault(problem, []).append(entry.label)
            else:
                details.append((entry, run_details(run, path)))
        bar.update()
    bar.close()
    return details, [
        f"no classes, confusions and images of {', '.join(labels)}: {problem}"
        for problem, labels in without_data.items()
    ]


def not_cifar_100(entries: Sequence[Entry], facts_of: Sequence[dict[str, str]]) -> list[str]:
    """Return a notice for each other data set that some entries were trained on."""
    labels: dict[str, list[str]] = {}
    for entry, one in zip(entries, facts_of, strict=True):
        labels.setdefault(one["data"], []).append(entry.label)
    return [
        f"Trained on {data}" + (f": {', '.join(names)}." if len(labels) > 1 else ".")
        for data, names in labels.items()
        if data != CIFAR_100
    ]


def default_title(entries: Sequence[Entry], data: str | None) -> str:
    """Return the name of the only recipe, or like `3 recipes on CIFAR-100`."""
    if len(entries) == 1:
        return entries[0].label
    return f"{len(entries)} recipes" + (f" on {data}" if data else "")


def repeated_seeds(groups: Sequence[Group]) -> list[str]:
    """Return a notice for each group with several runs of the same seed."""
    return [
        f"{group.label}: {len(group.runs)} runs, but {len(seeds)} seed(s), so the standard deviation "
        "is too small; leave out the runs that repeat a seed."
        for group in groups
        if len(seeds := {run.recipe.run.seed for run in group.runs}) < len(group.runs)
    ]


def render_page(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    data: Path | None = None,
    tutorial: bool = False,
    refresh_seconds: int | None = None,
) -> str:
    """Return the whole page as HTML; names from recipes and data are escaped.

    With `refresh_seconds`, the page is a short one that browsers reload: results and curves.
    """
    groups = group_runs(runs)
    entries = [
        Entry(label=group.label, index=index, runs=group.runs, group=group)
        for index, group in enumerate(groups)
    ]
    for run in runs:
        if not run.is_finished:
            entries.append(
                Entry(label=run.recipe.name, index=len(entries), runs=(run,), group=None)
            )
    details: list[tuple[Entry, Details]] = []
    notices = repeated_seeds(groups)
    if refresh_seconds is None:
        details, problems = all_details(entries, data)
        for problem in problems:
            log.warning(problem)
        notices += problems
    facts_of = [facts(entry, data) for entry in entries]
    shared = {
        name: value
        for name, value in facts_of[0].items()
        if all(one.get(name) == value for one in facts_of)
    }
    on_cifar_100 = shared.get("data") == CIFAR_100
    notices += not_cifar_100(entries, facts_of)
    plot = dot_plot(entries, REFERENCES if on_cifar_100 else ())
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("cifar_dist.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    context: dict[str, Any] = {
        "title": title or default_title(entries, shared.get("data")),
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "refresh_seconds": refresh_seconds,
        "runs": runs,
        "entries": entries,
        "cards": entries if len(entries) <= MAX_CARDS else [],
        "shared": shared,
        "own_facts": [
            [value for name, value in one.items() if name not in shared] for one in facts_of
        ],
        "plot": plot,
        "pairs": summarize_pairs(paired_tests(groups)),
        "tutorial": compare_with_published(groups) if tutorial else None,
        "top1_charts": top1_charts(entries),
        "charts": curve_charts(entries),
        "parameters": parameter_charts(
            [(run, entry.color) for entry in entries for run in entry.runs]
        ),
        "curve_notes": [
            note
            for note, applies in (
                ("Line: mean over the seeds", any(len(entry.runs) > 1 for entry in entries)),
                (
                    "band: from the lowest to the highest",
                    any(len(entry.runs) > 1 for entry in entries),
                ),
                ("Dotted: not finished", any(entry.group is None for entry in entries)),
            )
            if applies
        ],
        "details": details,
        "notices": notices,
        "mean_std": mean_std,
        "describe_interval": describe_interval,
        "reproduce": reproduce,
        "not_finished": sum(entry.group is None for entry in entries),
        "LOW": LOW,
        "SMALL": SMALL,
        "WIDE_CARD": WIDE_CARD,
    }
    return templates.get_template("page.html").render(context)
