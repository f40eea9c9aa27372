"""All measurements of speed, one command: a results file, and the tables of docs/performance.md."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: other work shares the cores

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from around import checkpoints, data_ready, start_up
from ddp import two_processes
from loops import evaluations, input_pipelines, loops_32, loops_224, null_loops
from measure import Conditions, Measured, machine
from tables import Results, page_part, write_page

from cifar_dist.data.dataset import load_split, read_digest
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/performance.md"
MEASUREMENTS: dict[str, Callable[[Conditions], Measured]] = {
    "input": input_pipelines,
    "null_loop": null_loops,
    "loops_32": loops_32,
    "loops_224": loops_224,
    "start_up": start_up,
    "data": data_ready,
    "evaluation": evaluations,
    "checkpoint": checkpoints,
    "ddp": two_processes,
}
EPILOG = f"""\
measurements: {", ".join(MEASUREMENTS)}

examples:
  python benchmarks/report.py --data data/cifar100
  python benchmarks/report.py --data data/cifar100 --only loops_32 ddp --rounds 11
  python benchmarks/report.py --tables

A results file keeps what it has of other measurements. benchmarks/README.md explains each.
"""


def read_results(path: Path) -> Results | None:
    """A results file of this command; None where there is none."""
    content = read_json(path)
    if path.exists() and (not isinstance(content, dict) or content.get("what") != "speed"):
        raise UserError(f"{path} is no results file of this benchmark; choose another --output")
    return content


def as_json(measured: Measured, conditions: Conditions, load: float) -> dict[str, Any]:
    turns = {
        row: [(float(f"{turn.by_clock:.5g}"), float(f"{turn.by_cpu:.5g}")) for turn in found]
        for row, found in measured.turns.items()
    }
    return {
        **stamp(conditions.device),
        "rounds": max(map(len, turns.values())),
        "load": load,
        "unit": measured.unit,
        "facts": dict(measured.facts),
        "turns": turns,  # of each round: a second of the clock, a second of CPU
    }


def stamp(device: torch.device) -> dict[str, Any]:
    """What machine() says; of a GPU, its name first."""
    found = machine()
    if device.type == "cuda":
        found["processor"] = found["hardware"]
        found["hardware"] = torch.cuda.get_device_name(device)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/report.py",
        description="Measure all that the project says about its speed: 15 minutes on a quiet machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("data/cifar100"), help="prepared data")
    parser.add_argument(
        "--output",
        type=Path,
        help="the results, JSON; default: benchmarks/results/speed_cuda.json, or ..._cpu.json",
    )
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help="these alone"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each row (default: 7)")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds a turn (default: 0.5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--backbone", default="resnet18", help="of the whole loops")
    parser.add_argument(
        "--page",
        type=Path,
        help="the page whose tables are written anew from all results beside --output; default: "
        "docs/performance.md, where --output is in benchmarks/results",
    )
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0 or options.threads < 1:
        raise UserError("--rounds, --seconds and --threads: give numbers above 0")

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output or RESULTS / f"speed_{kind}.json"
    page = options.page or (PAGE if output.parent.resolve() == RESULTS else None)
    before = read_results(output)
    if not options.tables:
        if len(load_split(options.data, "train").labels) < 250:
            raise UserError(f"{options.data} has fewer than 250 training rows")
        accelerator = init_distributed(timeout_seconds=600, threads=options.threads)
        conditions = Conditions(
            data=options.data,
            accelerator=accelerator,
            backbone=options.backbone,
            rounds=options.rounds,
            seconds=options.seconds,
        )
        same = ("backbone", options.backbone), ("device", accelerator.device.type)
        for name, value in same:
            if before and before[name] != value:
                raise UserError(f"{output} has {name} {before[name]}; choose another --output")
        if before and before["machine"]["threads"] != options.threads:
            raise UserError(f"{output} has another number of threads; choose another --output")
        results: Results = {
            "what": "speed",
            **dict(same),
            "machine": stamp(accelerator.device),
            "data": read_digest(options.data)["content"],
            "measurements": before["measurements"] if before else {},
        }
        for name in options.only or MEASUREMENTS:
            load, began = os.getloadavg()[0], time.monotonic()
            measured = MEASUREMENTS[name](conditions)
            results["measurements"][name] = as_json(measured, conditions, load)
            write_json(output, results)
            print(f"{name}: {time.monotonic() - began:.0f} s, in {output}", flush=True)
        destroy_distributed(accelerator)
    if page:
        files = [read_results(path) for path in sorted(output.parent.glob("speed_*.json"))]
        write_page(page, page_part([results for results in files if results]))
        print(f"tables: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
