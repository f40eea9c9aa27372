"""Run all speed measurements; write a results file and the tables of docs/performance.md."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: the cores may be shared

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
from measure import Conditions, Measurement, machine
from tables import Results, page_part, write_page

from cifar_dist.data.dataset import load_split, read_digest
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.utils.errors import UserError, run_command
from cifar_dist.utils.files import try_read_json, write_json

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/performance.md"
MEASUREMENTS: dict[str, Callable[[Conditions], Measurement]] = {
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

Other measurements in the results file are kept. benchmarks/README.md explains each measurement.
"""


def read_results(path: Path) -> Results | None:
    """Return the content of a results file, or None if there is no file."""
    content = try_read_json(path)
    if path.exists() and (content is None or content.get("what") != "speed"):
        raise UserError(f"{path}: not a results file of report.py; choose another --output")
    return content


def as_json(measurement: Measurement, conditions: Conditions, load: float) -> dict[str, Any]:
    turns = {
        name: [(float(f"{turn.by_clock:.5g}"), float(f"{turn.by_cpu:.5g}")) for turn in row]
        for name, row in measurement.turns.items()
    }
    return {
        **stamp(conditions.device),
        "rounds": max(map(len, turns.values())),
        "load": load,
        "unit": measurement.unit,
        "facts": dict(measurement.facts),
        "turns": turns,  # per round: units per second of wall time and of CPU time
    }


def stamp(device: torch.device) -> dict[str, Any]:
    """Return `machine()`; on a GPU, with the GPU as the hardware."""
    result = machine()
    if device.type == "cuda":
        result["processor"] = result["hardware"]
        result["hardware"] = torch.cuda.get_device_name(device)
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/report.py",
        description="Run all speed measurements (15 minutes on an idle machine).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("data/cifar100"), help="prepared data")
    parser.add_argument(
        "--output",
        type=Path,
        help="results file (JSON); default: benchmarks/results/speed_cuda.json or ..._cpu.json",
    )
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help="measurements to run"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns per row (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds per turn (default: 0.5)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--backbone", default="resnet18", help="network in the training loops")
    parser.add_argument(
        "--page",
        type=Path,
        help="page whose tables are regenerated from all results files in the folder of --output; "
        "default: docs/performance.md if that folder is benchmarks/results",
    )
    parser.add_argument("--tables", action="store_true", help="write the tables without measuring")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0 or options.threads < 1:
        raise UserError("--rounds, --seconds, --threads: must be greater than 0")

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    output = options.output or RESULTS / f"speed_{kind}.json"
    page = options.page or (PAGE if output.parent.resolve() == RESULTS else None)
    before = read_results(output)
    if not options.tables:
        if len(load_split(options.data, "train").labels) < 250:
            raise UserError(f"--data {options.data}: needs at least 250 training rows")
        accelerator = init_distributed(timeout_seconds=600, threads=options.threads)
        conditions = Conditions(
            data=options.data,
            accelerator=accelerator,
            backbone=options.backbone,
            rounds=options.rounds,
            seconds=options.seconds,
        )
        settings = {"backbone": options.backbone, "device": accelerator.device.type}
        for name, value in settings.items():
            if before and before[name] != value:
                raise UserError(f"{output}: has {name} {before[name]}; choose another --output")
        if before and before["machine"]["threads"] != options.threads:
            raise UserError(f"{output}: has another number of threads; choose another --output")
        results: Results = {
            "what": "speed",
            **settings,
            "machine": stamp(accelerator.device),
            "data": read_digest(options.data)["content"],
            "measurements": before["measurements"] if before else {},
        }
        for name in options.only or MEASUREMENTS:
            load, started = os.getloadavg()[0], time.monotonic()
            measurement = MEASUREMENTS[name](conditions)
            results["measurements"][name] = as_json(measurement, conditions, load)
            write_json(output, results)
            print(f"{name}: {time.monotonic() - started:.0f} s, in {output}", flush=True)
        destroy_distributed(accelerator)
    if page:
        files = [read_results(path) for path in sorted(output.parent.glob("speed_*.json"))]
        write_page(page, page_part([results for results in files if results]))
        print(f"tables: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
