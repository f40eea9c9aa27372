"""Format results files as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from around import UNVERIFIED
from ddp import DDP, INDEPENDENT
from input import TUTORIAL, TUTORIAL_AUGMENTED
from loops import CONSTANT, EAGER, OURS, RESNET50, SMALL_STEM, TIMM, TIMM_TUNED
from measure import Turn, median_range, ratios

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write

Results = dict[str, Any]  # content of a results file
Range = dict[str, float]  # median, least, most
Value = Callable[[Results], Range | None]
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Target:
    """A row of the first table, with its targets."""

    what: str
    realistic: str
    aim: str
    value: Value
    device: str = "cpu"  # that the targets apply to


def turns_of(results: Results, measurement: str) -> dict[str, list[Turn]]:
    rows = results["measurements"].get(measurement, {}).get("turns", {})
    return {row: [Turn(*turn) for turn in turns] for row, turns in rows.items()}


def ratio(measurement: str, row: str, base: str, *, by: str = "by_cpu") -> Value:
    """Return the speed of `row` relative to `base`, by wall time on a GPU."""

    def value(results: Results) -> Range | None:
        turns = turns_of(results, measurement)
        if row not in turns or base not in turns:
            return None
        return ratios(turns, row, base)["by_clock" if results["device"] == "cuda" else by]

    return value


def rate(measurement: str, row: str) -> Value:
    """Return units per second of wall time."""

    def value(results: Results) -> Range | None:
        turns = turns_of(results, measurement).get(row)
        return median_range([turn.by_clock for turn in turns]) if turns else None

    return value


def milliseconds(measurement: str, row: str) -> Value:
    """Return the wall time of a step."""

    def value(results: Results) -> Range | None:
        turns = turns_of(results, measurement).get(row)
        if not turns:
            return None
        batch_size = results["measurements"][measurement]["facts"]["batch_size"]
        return median_range([1000 * batch_size / turn.by_clock for turn in turns])

    return value


def seconds_of_epochs(epochs: int) -> Value:
    """Return the time of epochs of 50,000 images with an evaluation of 10,000 each."""

    def value(results: Results) -> Range | None:
        training = rate("loops_32", OURS)(results)
        evaluation = rate("evaluation", "network, ours")(results)
        if training is None or evaluation is None:
            return None
        return median_range(
            [epochs * (50_000 / training[key] + 10_000 / evaluation[key]) for key in training]
        )

    return value


AUGMENTED = "ours, crop and flip"
TARGETS = [
    Target("loader: ours / tutorial", "10", "20", ratio("input", "ours", TUTORIAL)),
    Target(
        "crop, flip, normalize: ours / PIL and torchvision",
        "30",
        "60",
        ratio(
            "input",
            "ours, crop, flip, float32 and normalized",
            "PIL and torchvision: crop, flip, normalize",
        ),
    ),
    Target("null-model loop: ours / tutorial", "4", "8", ratio("null_loop", "ours", TUTORIAL)),
    Target(
        "null-model loop, augmented: ours / tutorial",
        "12",
        "25",
        ratio("null_loop", AUGMENTED, TUTORIAL_AUGMENTED),
    ),
    Target(
        "null-model loop, augmented: ours / timm at its defaults",
        "40",
        "80",
        ratio("null_loop", AUGMENTED, "timm's loader and step at their defaults"),
    ),
    Target(
        "ResNet-18@32: ours / timm at its defaults", "1.6", "2.2", ratio("loops_32", OURS, TIMM)
    ),
    Target(
        "ResNet-18@32: ours / timm, tuned",
        "1.15",
        "1.5",
        ratio("loops_32", OURS, TIMM_TUNED),
    ),
    Target("ResNet-18@32: ours / tutorial", "1.5", "2", ratio("loops_32", OURS, TUTORIAL)),
    Target(
        "gloo: 2 DDP processes / 2 independent runs, wall time",
        "0.95",
        "0.99",
        ratio("ddp", DDP, INDEPENDENT, by="by_clock"),
    ),
    Target("... CPU time", "0.95", "0.99", ratio("ddp", DDP, INDEPENDENT)),
    Target(
        "data in memory: ours / pickle.load",
        "10",
        "50",
        ratio("data", UNVERIFIED, "pickle.load", by="by_clock"),
    ),
    Target(
        "ResNet-18@32, batch 250, augmented: ms per step",
        "1.5",
        "0.7",
        milliseconds("loops_32", OURS),
        device="cuda",
    ),
    Target(
        "... 200 epochs, each with an evaluation: s",
        "75",
        "35",
        seconds_of_epochs(200),
        device="cuda",
    ),
    Target(
        "ResNet-18, 3x3 stem, @32: images/s",
        "80,000",
        "130,000",
        rate("loops_32", SMALL_STEM),
        device="cuda",
    ),
    Target("ResNet-18@224: images/s", "13,000", "25,000", rate("loops_224", OURS), device="cuda"),
    Target("ResNet-50@224: images/s", "5,000", "8,000", rate("loops_224", RESNET50), device="cuda"),
    Target(
        "ResNet-18@32: step on a constant batch / with the pipeline",
        "1.03",
        "1.01",
        ratio("loops_32", CONSTANT, OURS),
        device="cuda",
    ),
    Target(
        "ResNet-18@32: CUDA graphs / eager", "3", "6", ratio("loops_32", OURS, EAGER), device="cuda"
    ),
]


def format_number(value: float) -> str:
    """Format with three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def format_range(value: Range | None) -> str:
    if value is None:
        return ""
    median, low, high = (format_number(value[key]) for key in ("median", "least", "most"))
    return f"{median} ({low} - {high})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def column_name(results: Results) -> str:
    stamp = results["machine"]
    if results["device"] == "cuda":
        return stamp["hardware"]
    count = stamp["threads"]
    return f"{stamp['hardware']}, {count} thread{'s' if count > 1 else ''}"


def target_table(files: Sequence[Results]) -> str:
    columns = [column_name(results) for results in files]
    if not any(results["device"] == "cuda" for results in files):
        columns.append("a GPU")
    rows = [["what", "realistic", "aim", *columns]]
    for row in TARGETS:
        cells = [
            format_range(row.value(results)) if row.device in (results["device"], "cpu") else ""
            for results in files
        ]
        cells += [""] * (len(columns) - len(cells))
        suffix = " (H200)" if row.device == "cuda" else ""
        rows.append([row.what + suffix, row.realistic, row.aim, *cells])
    return markdown(rows)


def measurement_table(name: str, measured: dict[str, Any]) -> str:
    """Return the table of one measurement: wall time, CPU time, and step details on a GPU."""
    unit, steps = measured["unit"], measured["facts"].get("steps", {})
    slow = unit in ("starts", "openings", "checkpoints")
    head = [name, *(("ms", "CPU ms") if slow else (f"{unit}/s", f"{unit} per CPU s"))]
    if steps:
        head += ["ms per step", "floor, ms", "floor / time", "kernels", "MiB"]
    rows = [head]
    for row, turns in measured["turns"].items():
        clock, cpu = (list(values) for values in zip(*turns, strict=True))
        if slow:
            clock, cpu = ([1000 / value for value in values] for values in (clock, cpu))
        line = [row, format_range(median_range(clock)), format_number(median(cpu))]
        if steps:
            line += step_cells(steps.get(row), clock)
        rows.append(line)
    return markdown(rows)


def step_cells(step: dict[str, Any] | None, images_per_second: Sequence[float]) -> list[str]:
    if step is None:
        return [""] * 5
    took = median([1000 * step["batch_size"] / images for images in images_per_second])
    floor = step.get("floor_milliseconds")
    return [
        format_number(took),
        format_number(floor) if floor else "",
        f"{100 * floor / took:.0f} %" if floor else "",
        str(step["kernels"]),
        f"{step['memory_bytes'] / 2**20:,.0f}",
    ]


def stamp(measured: dict[str, Any]) -> str:
    return (
        f"{measured['date']}, commit {measured['commit']}, torch {measured['torch']}, "
        f"{measured['rounds']} rounds, load average at start {measured['load']:.1f}"
    )


def page_part(files: Sequence[Results]) -> str:
    """Return the generated part of the page."""
    parts = [target_table(files)]
    for results in files:
        parts.append(f"### {column_name(results)}")
        parts.append(
            f"{results['machine']['cores']} cores, network `{results['backbone']}`. Cells have the "
            "median of the rounds, with the minimum and maximum."
        )
        for name, measured in results["measurements"].items():
            parts.append(measurement_table(f"**{name}**", measured))
            facts = {k: v for k, v in measured["facts"].items() if k != "steps"}
            parts.append("; ".join([stamp(measured), *(f"{k}: {v}" for k, v in facts.items())]))
    return "\n\n".join(parts)


def write_page(page: Path, part: str) -> None:
    """Replace the generated part of a page."""
    text = page.read_text() if page.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page}: must contain the lines {BEGIN} and {END} once, in this order")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    atomic_write(page, f"{before}{BEGIN}\n\n{part}\n\n{after}")
