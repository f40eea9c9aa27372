"""results/accuracy_*.json and docs/results/*.jsonl -> the tables of docs/results.md; it measures nothing."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accuracy import Row, read_rows
from shortened import STUDIES
from tables import markdown, write_page

from cifar_dist.reporting.charts import HEIGHT, WIDTH, Series, line_chart
from cifar_dist.reporting.tutorial import PUBLISHED
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import atomic_write

HERE = Path(__file__).parent
LOGS = HERE.parent / "docs/results"
# The colours of the report's page, for a file that stands alone.
LIGHT = ("#2458b3", "#c2571a", "#1f7a4d", "#a3317f", "#8a6d00", "#0f7c8c", "#6b4bb8", "#6d6d6d")
DARK = ("#82acff", "#ffa066", "#62c894", "#ee8acb", "#e2c044", "#5fd0df", "#b79bff", "#b5b5b5")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#555}.mid{text-anchor:middle}.end{text-anchor:end}"
    ".grid,.axis{stroke:#8884;fill:none}.line{fill:none;stroke:currentColor;stroke-width:1.8}"
    ".dot{fill:currentColor}.dash1{stroke-dasharray:6 3}"
    + "".join(f".c{place}{{color:{colour}}}" for place, colour in enumerate(LIGHT))
    + "@media(prefers-color-scheme:dark){text{fill:#bbb}"
    + "".join(f".c{place}{{color:{colour}}}" for place, colour in enumerate(DARK))
    + "}"
)
MOST_COLUMNS = 10  # of a table of curves
Rows = Sequence[Row]  # finished runs of one recipe


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A row of the first table."""

    what: str
    tutorial: str = ""  # published, best test epoch
    protocol: str = ""  # the recipe that repeats it
    field: str = ""  # what others report
    ours: str = ""  # our recipe for the same end


FIELD = {  # beside the tutorial's rows
    "resnet18_baseline": "78.43 (3x3 stem, 200 epochs, edadaltocg/resnet18_cifar100)",
    "resnet50_pretrained_arcface": "80.93 (from scratch, 300 epochs, edadaltocg/resnet50_cifar100)",
}
AIMS = [
    Aim(
        what=row.what,
        tutorial=f"{row.published:.2f}" if row.published else "",
        protocol=row.config,
        field=FIELD.get(row.config, ""),
        ours=row.ours or "",
    )
    for row in PUBLISHED
] + [
    Aim(
        what="the best from scratch at 32 px",
        field="83.5 to 84 (WRN-28-10, SAM and CutMix class)",
        ours="wrn28_10_32",
    ),
    Aim(
        what="R32x4 teaches R8x4: KD", field="73.33 (HobbitLong/RepDistiller)", ours="kd_resnet8x4_kd"
    ),
    Aim(
        what="R32x4 teaches R8x4: DKD", field="76.32 (mdistiller)", ours="kd_resnet8x4_dkd"
    ),
    Aim(what="EfficientNet-Lite0, ImageNet weights, 224 px", ours="lite0_224"),
    Aim(what="75 % from scratch, in seconds", field="3.5 to 4.0 s on an A100 (AIDDA-Institute/CIFAR-100-speedrun)", ours="speed_75"),
]  # fmt: skip


def mean_and_deviation(rows: Rows, value: str) -> str:
    """ "78.41 +- 0.21": the sample standard deviation, from two runs on."""
    values = [row[value] for row in rows]
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def conditions(rows: Rows) -> str:
    """How many runs, how long, on what."""
    if not rows:
        return ""
    seconds = statistics.median(row["seconds"] for row in rows)
    hardware = ", ".join(sorted({row["hardware"] for row in rows}))
    return f"n = {len(rows)}, {rows[0]['epochs']:g} epochs, {seconds:,.0f} s, {hardware}"


def aims_table(of: dict[str, Rows]) -> str:
    """The tutorial, its protocol by us, the field, ours; blank where no run is."""
    head = [
        "what",
        "tutorial, best test epoch",
        "its protocol by us, best test epoch",
        "last epoch",
    ]
    lines = [[*head, "its runs", "the field", "ours, last epoch", "recipe", "runs of ours"]]
    told = set()
    for aim in AIMS:
        name = "" if aim.ours in told else aim.ours  # once, at the first row that it is beside
        told.add(name)
        protocol, ours = of.get(aim.protocol, ()), of.get(name, ())
        lines.append(
            [
                aim.what,
                aim.tutorial,
                mean_and_deviation(protocol, "best_test_top1"),
                mean_and_deviation(protocol, "top1"),
                conditions(protocol),
                aim.field,
                mean_and_deviation(ours, "top1"),
                f"`{name}`" if name else "",
                conditions(ours),
            ]
        )
    return markdown(lines)


def study_table(study: str, of: dict[str, Rows]) -> str:
    """The rows of a shortened study that have runs."""
    held_out = any("val_top1" in row for name in STUDIES[study] for row in of.get(name, ()))
    columns = {"top1": "top-1, last epoch", "best_test_top1": "best test epoch", "top5": "top-5"}
    if held_out:
        columns = {"val_top1": "held out, last epoch", "top1": "top-1, last epoch"}
    lines = [["row", *columns.values(), "runs"]]
    for name in STUDIES[study]:
        if rows := of.get(name):
            cells = [mean_and_deviation(rows, column) for column in columns]
            lines.append([f"`{name}`", *cells, conditions(rows)])
    return markdown(lines)


def mean_curves(study: str, logs: Path) -> dict[str, tuple[int, list[float]]]:
    """row -> (runs, top-1 of the test split after each epoch, their mean), of the logs that are there."""
    found = {}
    for name in STUDIES[study]:
        curves = [evaluations(path) for path in sorted(logs.glob(f"{name}_seed*.jsonl"))]
        if curves:
            means = [statistics.mean(values) for values in zip(*curves, strict=True)]
            found[name] = (len(curves), means)
    return found


def curves_table(curves: dict[str, tuple[int, list[float]]]) -> str:
    """Top-1 after each epoch, or after every N-th where there are many."""
    epochs = max(len(means) for _, means in curves.values())
    every = math.ceil(epochs / MOST_COLUMNS)
    lines = [
        [f"`{name}`", str(runs), *(f"{value:.1f}" for value in means[every - 1 :: every])]
        for name, (runs, means) in curves.items()
    ]
    return markdown([["row", "n", *map(str, range(every, epochs + 1, every))], *lines])


def curves_picture(curves: dict[str, tuple[int, list[float]]]) -> str:
    """An SVG file: the chart, and the names beside it."""
    series = [
        Series(
            name=name, group=place, points=[(epoch + 1, top1) for epoch, top1 in enumerate(means)]
        )
        for place, (name, (_, means)) in enumerate(curves.items())
    ]
    chart = line_chart(series, x_label="epoch", y_label="top-1 of the test split, %")
    names = "".join(
        f'<path class="line {one.style}" d="M{WIDTH + 8} {45 + 20 * one.group}h22"/>'
        f'<text class="label" x="{WIDTH + 38}" y="{49 + 20 * one.group}">{one.name}</text>'
        for one in series
    )
    inner = str(chart).replace("<svg ", f'<svg width="{WIDTH}" height="{HEIGHT}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 220} {HEIGHT}">'
        f"<style>{STYLE}</style>{inner}{names}</svg>\n"
    )


def evaluations(log: Path) -> list[float]:
    """Top-1 in percent after each epoch."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["top1"] for line in lines if line["kind"] == "eval"]


def stamps(rows: Rows) -> str:
    versions = sorted({f"torch {row['torch']}" for row in rows})
    dates = sorted({row["date"][:10] for row in rows})
    commits = sorted({(row["commit"] or "unknown")[:7] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{', '.join(versions)}; {when}; commit {', '.join(commits)}"


def page_part(rows: Rows, logs: Path) -> str:
    """Everything between the two marks."""
    of: dict[str, Rows] = {
        name: [row for row in rows if row["recipe"] == name]
        for name in dict.fromkeys(row["recipe"] for row in rows)
    }
    parts = ["### At full length", aims_table(of)]
    for study, titles in STUDIES.items():
        if any(name in of for name in titles):
            parts += [f"### Shortened: {study}", study_table(study, of)]
            if curves := mean_curves(study, logs):
                picture = f"![{study}: top-1 after each epoch]({LOGS.name}/{study}.svg)"
                parts += [
                    picture,
                    "Top-1 of the test split after each epoch, %:",
                    curves_table(curves),
                ]
    if rows:
        parts.append(stamps(rows))
    return "\n\n".join(part for part in parts if part)


def read_all(folder: Path) -> list[Row]:
    """The rows of all results files; no mean may mix those of two.

    A recipe that a GPU has trained has its runs alone. UserError where other files share a recipe.
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
                    f"{first} and {path} both hold runs of {row['recipe']}, and its logs have one name: "
                    "remove the runs from one of them"
                )
            rows.append(row)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/results_page.py",
        description="Write the tables of docs/results.md from the results files.",
    )
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/results.md")
    parser.add_argument("--logs", type=Path, default=LOGS)
    options = parser.parse_args(arguments)
    rows = read_all(HERE / "results")
    write_page(options.page, page_part(rows, options.logs))
    for study in STUDIES:
        if curves := mean_curves(study, options.logs):
            atomic_write(options.logs / f"{study}.svg", curves_picture(curves))
    print(f"{options.page}: {len(rows)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
