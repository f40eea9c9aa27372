"""Write the tables and charts of docs/results.md from results/accuracy_*.json and results/curves."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy import Row, read_rows
from shortened import STUDIES
from tables import markdown, write_page

from cifar_dist.reporting.charts import Frame, Series, line_chart
from cifar_dist.reporting.tutorial import PUBLISHED
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import atomic_write

HERE = Path(__file__).parent
CURVES = HERE / "results/curves"
CHARTS = HERE.parent / "docs/results"
# The colors of the HTML report, for standalone SVG files.
LIGHT = ("#2458b3", "#c2571a", "#1f7a4d", "#a3317f", "#8a6d00", "#0f7c8c", "#6b4bb8", "#6d6d6d")
DARK = ("#82acff", "#ffa066", "#62c894", "#ee8acb", "#e2c044", "#5fd0df", "#b79bff", "#b5b5b5")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#555}.mid{text-anchor:middle}.end{text-anchor:end}"
    ".grid,.axis{stroke:#8884;fill:none}.line{fill:none;stroke:currentColor;stroke-width:1.8}"
    ".dot{fill:currentColor}.tip{fill-opacity:0}.leader{stroke:#8886;fill:none}"
    ".name{font-weight:600;fill:currentColor}.dash1{stroke-dasharray:6 3}"
    + "".join(f".c{index}{{color:{color}}}" for index, color in enumerate(LIGHT))
    + "@media(prefers-color-scheme:dark){text{fill:#bbb}"
    + "".join(f".c{index}{{color:{color}}}" for index, color in enumerate(DARK))
    + "}"
)
CHART_FRAME = Frame(width=700, right=240)
MAX_COLUMNS = 10  # of a table of curves
Rows = Sequence[Row]  # finished runs of one recipe
Curve = dict[float, float]  # test top-1 in percent by epoch


@dataclass(frozen=True, kw_only=True)
class FullLengthRow:
    """A row of the first table."""

    what: str
    tutorial: str = ""  # published, best test epoch
    protocol: str = ""  # recipe that reproduces it
    other: str = ""  # published by others
    ours: str = ""  # our recipe for the same task


OTHERS = {
    "resnet18_baseline": "78.43 (3x3 stem, 200 epochs, edadaltocg/resnet18_cifar100)",
    "resnet50_pretrained_arcface": "80.93 (from scratch, 300 epochs, edadaltocg/resnet50_cifar100)",
}
FULL_LENGTH = [
    FullLengthRow(
        what=row.what,
        tutorial=f"{row.published:.2f}" if row.published else "",
        protocol=row.config,
        other=OTHERS.get(row.config, ""),
        ours=row.ours or "",
    )
    for row in PUBLISHED
] + [
    FullLengthRow(
        what="best from scratch at 32 px",
        other="83.5 to 84 (WRN-28-10, SAM and CutMix class)",
        ours="wrn28_10_32",
    ),
    FullLengthRow(
        what="KD, R32x4 to R8x4", other="73.33 (HobbitLong/RepDistiller)", ours="kd_resnet8x4_kd"
    ),
    FullLengthRow(
        what="DKD, R32x4 to R8x4", other="76.32 (mdistiller)", ours="kd_resnet8x4_dkd"
    ),
    FullLengthRow(what="EfficientNet-Lite0, ImageNet weights, 224 px", ours="lite0_224"),
    FullLengthRow(what="75 % from scratch in minimum time", other="3.5 to 4.0 s on an A100 (AIDDA-Institute/CIFAR-100-speedrun)", ours="speed_75"),
]  # fmt: skip


def mean_std(rows: Rows, value: str) -> str:
    """Format mean and sample standard deviation, for example "78.41 +- 0.21"."""
    values = [row[value] for row in rows]
    if not values:
        return ""
    std = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{std}"


def conditions(rows: Rows) -> str:
    """Format the number of runs, their length, time and hardware."""
    if not rows:
        return ""
    seconds = statistics.median(row["seconds"] for row in rows)
    hardware = ", ".join(sorted({row["hardware"] for row in rows}))
    return f"n = {len(rows)}, {rows[0]['epochs']:g} epochs, {seconds:,.0f} s, {hardware}"


def full_length_table(by_recipe: dict[str, Rows]) -> str:
    """Return the table of full-length runs; cells without a run are empty."""
    lines = [
        [
            "task",
            "tutorial (published), best test epoch",
            "reproduced, best test epoch",
            "reproduced, last epoch",
            "runs",
            "published by others",
            "ours, last epoch",
            "recipe",
            "runs",
        ]
    ]
    listed = set()
    for row in FULL_LENGTH:
        name = "" if row.ours in listed else row.ours  # list each recipe once
        listed.add(name)
        protocol, ours = by_recipe.get(row.protocol, ()), by_recipe.get(name, ())
        lines.append(
            [
                row.what,
                row.tutorial,
                mean_std(protocol, "best_test_top1"),
                mean_std(protocol, "top1"),
                conditions(protocol),
                row.other,
                mean_std(ours, "top1"),
                f"`{name}`" if name else "",
                conditions(ours),
            ]
        )
    return markdown(lines)


def study_table(study: str, by_recipe: dict[str, Rows]) -> str:
    """Return the table of a study's rows that have runs."""
    columns = {"top1": "top-1, last epoch", "best_test_top1": "best test epoch", "top5": "top-5"}
    if any("val_top1" in row for name in STUDIES[study] for row in by_recipe.get(name, ())):
        columns = {"val_top1": "validation, last epoch", "top1": "top-1, last epoch"}
    lines = [["row", *columns.values(), "runs"]]
    for name in STUDIES[study]:
        if rows := by_recipe.get(name):
            cells = [mean_std(rows, column) for column in columns]
            lines.append([f"`{name}`", *cells, conditions(rows)])
    return markdown(lines)


def mean_curves(study: str, logs: Path) -> dict[str, tuple[int, Curve]]:
    """Return {row: (number of runs, mean test top-1 by epoch)} of the available logs."""
    result = {}
    for name in STUDIES[study]:
        curves = [evaluations(path) for path in sorted(logs.glob(f"{name}_seed*.jsonl"))]
        if curves:
            means = {epoch: statistics.mean(one[epoch] for one in curves) for epoch in curves[0]}
            result[name] = (len(curves), means)
    return result


def curves_table(curves: dict[str, tuple[int, Curve]]) -> str:
    """Return the table of top-1 by epoch, of every n-th evaluation to fit MAX_COLUMNS."""
    epochs = sorted({epoch for _, means in curves.values() for epoch in means})
    every = math.ceil(len(epochs) / MAX_COLUMNS)
    shown = epochs[every - 1 :: every]
    lines = [
        [
            f"`{name}`",
            str(runs),
            *(f"{means[epoch]:.1f}" if epoch in means else "" for epoch in shown),
        ]
        for name, (runs, means) in curves.items()
    ]
    return markdown([["row", "n", *(f"{epoch:g}" for epoch in shown)], *lines])


def curves_svg(curves: dict[str, tuple[int, Curve]]) -> str:
    """Return an SVG file with the chart and the names of its lines."""
    series = [
        Series(name=name, group=index, points=list(means.items()))
        for index, (name, (_, means)) in enumerate(curves.items())
    ]
    chart = line_chart(
        series, x_label="epoch", y_label="top-1 of the test split, %", frame=CHART_FRAME
    )
    assert chart is not None
    head, _, body = str(chart).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{body}\n'


def evaluations(log: Path) -> Curve:
    """Return test top-1 in percent by epoch."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["epoch"]: line["top1"] for line in lines if line["kind"] == "eval"}


def stamps(rows: Rows) -> str:
    versions = sorted({f"torch {row['torch']}" for row in rows})
    dates = sorted({row["date"][:10] for row in rows})
    commits = sorted({(row["commit"] or "unknown")[:7] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{', '.join(versions)}; {when}; commit {', '.join(commits)}"


def page_part(rows: Rows, logs: Path) -> str:
    """Return the generated part of the page."""
    by_recipe: dict[str, Rows] = {
        name: [row for row in rows if row["recipe"] == name]
        for name in dict.fromkeys(row["recipe"] for row in rows)
    }
    parts = ["### Full length", full_length_table(by_recipe)]
    for study, titles in STUDIES.items():
        if any(name in by_recipe for name in titles):
            parts += [f"### Shortened: {study}", study_table(study, by_recipe)]
            if curves := mean_curves(study, logs):
                parts += [
                    f"![{study}: top-1 after each epoch]({CHARTS.name}/{study}.svg)",
                    "Test top-1 after each epoch, %:",
                    curves_table(curves),
                ]
    if rows:
        parts.append(stamps(rows))
    return "\n\n".join(part for part in parts if part)


def read_all(folder: Path) -> list[Row]:
    """Return the rows of all results files, without mixing files within a recipe.

    GPU results replace CPU results of the same recipe. Raise UserError if other files share a recipe.
    """
    rows: list[Row] = []
    where: dict[str, Path] = {}
    for path in sorted(folder.glob("accuracy_*.json"), key=lambda path: "cuda" not in path.name):
        for row in read_rows(path):
            first = where.setdefault(row["recipe"], path)
            if first != path and "cuda" in first.name:
                continue
            if first != path:
                raise UserError(
                    f"{first} and {path} both contain runs of {row['recipe']}; "
                    "remove them from one of the files"
                )
            rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/results_page.py",
        description="Write the tables of docs/results.md from the results files.",
    )
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/results.md")
    parser.add_argument("--logs", type=Path, default=CURVES, help="folder with the runs' logs")
    options = parser.parse_args(arguments)
    rows = read_all(HERE / "results")
    write_page(options.page, page_part(rows, options.logs))
    for study in STUDIES:
        if curves := mean_curves(study, options.logs):
            atomic_write(CHARTS / f"{study}.svg", curves_svg(curves))
    print(f"{os.path.relpath(options.page)}: {len(rows)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
