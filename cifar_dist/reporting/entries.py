"""The entries of the page: recipes with their seeds, and unfinished runs; their facts and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from cifar_dist.inference.stored_run import Run
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.recipe.runs import training_data
from cifar_dist.reporting.charts import COLORS, SMALL, WIDE, Frame, Series, line_chart, number
from cifar_dist.reporting.comparison import Group, group_runs

TEST_TOP1 = ("eval", "top1", "test top-1, %")
OTHER_CURVES = (  # axis label, and the (kind of record, key) pairs of its lines
    ("loss: test (bold) and training (thin)", (("eval", "loss"), ("train", "loss"))),
    (
        "top-1, %: validation (bold) and training (thin)",
        (("eval", "val_top1"), ("train", "top1")),
    ),
    ("learning rate", (("train", "lr"),)),
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


def list_entries(runs: Sequence[Run]) -> list[Entry]:
    """Return the recipes with finished runs, then the unfinished runs."""
    groups = group_runs(runs)
    entries = [
        Entry(label=group.label, index=index, runs=group.runs, group=group)
        for index, group in enumerate(groups)
    ]
    unfinished = [run for run in runs if not run.is_finished]
    return entries + [
        Entry(label=run.recipe.name, index=index, runs=(run,), group=None)
        for index, run in enumerate(unfinished, len(groups))
    ]


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
    if recipe.all_teachers:
        teachers = ", ".join(teacher.run for teacher in recipe.all_teachers)
        values["teacher"] = f"distilled from {teachers}"
    if recipe.averaging:
        values["averaging"] = f"evaluated with averaged weights ({recipe.averaging.kind})"
    return values


def curve_notes(entries: Sequence[Entry]) -> list[str]:
    """Return what the lines of the charts mean, as far as the reader needs it."""
    notes = []
    if any(len(entry.runs) > 1 for entry in entries):
        notes.append("Line: mean over the seeds; band: from the lowest to the highest.")
    if any(entry.group is None for entry in entries):
        notes.append("Dotted: not finished.")
    return notes
