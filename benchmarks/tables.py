"""Results files -> the tables of docs/performance.md, beside the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from around import AT_HAND
from ddp import APART, TOGETHER
from input import TUTORIAL, TUTORIAL_AUGMENTED
from loops import CONSTANT, EAGER, OURS, RESNET50, SMALL_STEM, TIMM, TIMM_TUNED
from measure import Turn, ratios, spread

from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import atomic_write

Results = dict[str, Any]  # a results file
Spread = dict[str, float]  # median, least, most
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A row of the first table: what is compared, what would be good, how it is found."""

    what: str
    realistic: str
    aim: str
    device: str  # whose targets these are
    value: Callable[[Results], Spread | None]


def turns_of(results: Results, measurement: str) -> dict[str, list[Turn]]:
    found = results["measurements"].get(measurement, {}).get("turns", {})
    return {row: [Turn(*turn) for turn in turns] for row, turns in found.items()}


def ratio(
    measurement: str, row: str, base: str, *, by: str = "by_cpu"
) -> Callable[[Results], Spread | None]:
    """Ours against a peer's, in the same rounds; on a GPU always by the clock."""

    def value(results: Results) -> Spread | None:
        turns = turns_of(results, measurement)
        if row not in turns or base not in turns:
            return None
        return ratios(turns, row, base)["by_clock" if results["device"] == "cuda" else by]

    return value


def rate(measurement: str, row: str) -> Callable[[Results], Spread | None]:
    """Units a second of the clock."""

    def value(results: Results) -> Spread | None:
        turns = turns_of(results, measurement).get(row)
        return spread([turn.by_clock for turn in turns]) if turns else None

    return value


def milliseconds(measurement: str, row: str) -> Callable[[Results], Spread | None]:
    """Of a step, by the clock."""

    def value(results: Results) -> Spread | None:
        turns = turns_of(results, measurement).get(row)
        if not turns:
            return None
        batch_size = results["measurements"][measurement]["facts"]["batch_size"]
        return spread([1000 * batch_size / turn.by_clock for turn in turns])

    return value


def seconds_of_epochs(epochs: int) -> Callable[[Results], Spread | None]:
    """Epochs of 200 steps of 250 pictures and an evaluation of 10,000 each, put together."""

    def value(results: Results) -> Spread | None:
        step = rate("loops_32", OURS)(results)
        look = rate("evaluation", "network, ours")(results)
        if step is None or look is None:
            return None
        return spread([epochs * (50_000 / step[of] + 10_000 / look[of]) for of in step])

    return value


def target(
    what: str,
    realistic: str,
    aim: str,
    value: Callable[[Results], Spread | None],
    *,
    device: str = "cpu",
) -> Target:
    return Target(what=what, realistic=realistic, aim=aim, device=device, value=value)


AUGMENTED = "ours, crop and flip"
TARGETS = [
    target("loader: ours / tutorial", "10", "20", ratio("input", "ours", TUTORIAL)),
    target(
        "crop, flip, normalise: ours / PIL and torchvision",
        "30",
        "60",
        ratio(
            "input",
            "ours, crop, flip, float32 and normalised",
            "PIL and torchvision: crop, flip, normalise",
        ),
    ),
    target("null-model loop: ours / tutorial", "4", "8", ratio("null_loop", "ours", TUTORIAL)),
    target(
        "null-model loop, augmented: ours / tutorial",
        "12",
        "25",
        ratio("null_loop", AUGMENTED, TUTORIAL_AUGMENTED),
    ),
    target(
        "null-model loop, augmented: ours / timm at its defaults",
        "40",
        "80",
        ratio("null_loop", AUGMENTED, "timm's loader and step at their defaults"),
    ),
    target(
        "ResNet-18@32: ours / timm at its defaults", "1.6", "2.2", ratio("loops_32", OURS, TIMM)
    ),
    target(
        "ResNet-18@32: ours / timm, bf16, channels_last",
        "1.15",
        "1.5",
        ratio("loops_32", OURS, TIMM_TUNED),
    ),
    target("ResNet-18@32: ours / tutorial", "1.5", "2", ratio("loops_32", OURS, TUTORIAL)),
    target(
        "gloo: 2 processes together / 2 apart, by the clock",
        "0.95",
        "0.99",
        ratio("ddp", TOGETHER, APART, by="by_clock"),
    ),
    target("... by CPU time", "0.95", "0.99", ratio("ddp", TOGETHER, APART)),
    target(
        "data open and ready: ours / pickle.load",
        "10",
        "50",
        ratio("data", AT_HAND, "pickle.load", by="by_clock"),
    ),
    target(
        "ResNet-18@32, batch 250, augmented: ms a step",
        "1.5",
        "0.7",
        milliseconds("loops_32", OURS),
        device="cuda",
    ),
    target(
        "200 epochs of it with an evaluation each: s",
        "75",
        "35",
        seconds_of_epochs(200),
        device="cuda",
    ),
    target(
        "ResNet-18, 3x3 stem, @32: images/s",
        "80,000",
        "130,000",
        rate("loops_32", SMALL_STEM),
        device="cuda",
    ),
    target("ResNet-18@224: images/s", "13,000", "25,000", rate("loops_224", OURS), device="cuda"),
    target("ResNet-50@224: images/s", "5,000", "8,000", rate("loops_224", RESNET50), device="cuda"),
    target(
        "ResNet-18@32: step on a constant batch / with the pipeline",
        "1.03",
        "1.01",
        ratio("loops_32", CONSTANT, OURS),
        device="cuda",
    ),
    target(
        "ResNet-18@32: recorded / by hand", "3", "6", ratio("loops_32", OURS, EAGER), device="cuda"
    ),
]


def shown(value: float) -> str:
    """Three digits that matter."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def with_spread(found: Spread | None) -> str:
    if found is None:
        return ""
    return f"{shown(found['median'])} ({shown(found['least'])} - {shown(found['most'])})"


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
            with_spread(row.value(results)) if row.device in (results["device"], "cpu") else ""
            for results in files
        ]
        cells += [""] * (len(columns) - len(cells))
        of_gpu = " (H200)" if row.device == "cuda" else ""
        rows.append([row.what + of_gpu, row.realistic, row.aim, *cells])
    return markdown(rows)


def measurement_table(name: str, measured: dict[str, Any], device: str) -> str:
    """All rows of one measurement: by the clock, by CPU time, and ours against each."""
    turns = {row: [Turn(*turn) for turn in found] for row, found in measured["turns"].items()}
    unit, steps = measured["unit"], measured["facts"].get("steps", {})
    slow = unit in ("starts", "openings", "checkpoints")
    measures = "ms by the clock" if slow else f"{unit}/s by the clock"
    head = [name, measures, "ms of CPU" if slow else f"{unit} a CPU s"]
    if steps:
        head += ["ms a step", "floor, ms", "share of it", "kernels", "MiB"]
    rows = [head]
    for row, found in turns.items():
        clock, cpu = ([getattr(turn, of) for turn in found] for of in ("by_clock", "by_cpu"))
        if slow:
            clock, cpu = ([1000 / value for value in values] for values in (clock, cpu))
        line = [row, with_spread(spread(clock)), shown(spread(cpu)["median"])]
        if steps:
            line += step_cells(steps.get(row), clock)
        rows.append(line)
    return markdown(rows)


def step_cells(step: dict[str, Any] | None, images_per_second: Sequence[float]) -> list[str]:
    if step is None:
        return [""] * 5
    took = spread([1000 * step["batch_size"] / images for images in images_per_second])["median"]
    floor = step.get("floor_milliseconds")
    return [
        shown(took),
        shown(floor) if floor else "",
        f"{100 * floor / took:.0f} %" if floor else "",
        str(step["kernels"]),
        f"{step['memory_bytes'] / 2**20:,.0f}",
    ]


def stamp(measured: dict[str, Any]) -> str:
    return (
        f"{measured['date']}, commit {measured['commit']}, torch {measured['torch']}, "
        f"{measured['rounds']} rounds, load of the machine at the start {measured['load']:.1f}"
    )


def page_part(files: Sequence[Results]) -> str:
    """Everything between the two marks."""
    parts = [target_table(files)]
    for results in files:
        parts.append(f"### {column_name(results)}")
        parts.append(
            f"{results['machine']['cores']} cores, network `{results['backbone']}`. In each cell the "
            "median of the rounds, and the least and the most."
        )
        for name, measured in results["measurements"].items():
            parts.append(measurement_table(f"**{name}**", measured, results["device"]))
            facts = {k: v for k, v in measured["facts"].items() if k != "steps"}
            said = "; ".join(f"{fact}: {value}" for fact, value in facts.items())
            parts.append(stamp(measured) + (f"; {said}" if said else ""))
    return "\n\n".join(parts)


def write_page(page: Path, part: str) -> None:
    """Replace what stands between the marks; the rest of the page stays as it is."""
    text = page.read_text() if page.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page}: needs the lines {BEGIN} and {END}, once, in this order")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    atomic_write(page, f"{before}{BEGIN}\n\n{part}\n\n{after}")
