"""Interleaved measurements: rows take turns, so that background load affects all of them alike."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cifar_dist.training.environment import git_commit
from cifar_dist.utils.host import processor_name

Work = Callable[[], int]  # does a piece of work and returns the number of units (e.g. images)


@dataclass(frozen=True)
class Turn:
    """Throughput of one turn: units per second of wall time and per second of CPU time."""

    by_clock: float
    by_cpu: float


Turns = Mapping[str, list[Turn]]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Settings shared by all measurements of a report."""

    data: Path
    accelerator: Accelerator
    backbone: str  # timm name of the network in the training loops
    rounds: int
    seconds: float  # minimum length of a turn

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def turns(self, works: Mapping[str, Work], *, seconds: float | None = None) -> Turns:
        return take_turns(
            works,
            rounds=self.rounds,
            seconds=self.seconds if seconds is None else seconds,
            sync=lambda: synchronize(self.device),
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    unit: str  # counted by the turns
    turns: Turns
    facts: Mapping[str, Any]


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    works: Mapping[str, Work],
    *,
    rounds: int,
    seconds: float,
    sync: Callable[[], None] = lambda: None,
) -> dict[str, list[Turn]]:
    """Run all works in turns (A B C, A B C, ...) and return the turns of each.

    A turn repeats its work for at least `seconds` and ends with `sync`. The first round is a warm-up
    and is not counted.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, work in works.items():
            units, clock, cpu = 0, time.perf_counter(), cpu_seconds()
            while not units or time.perf_counter() - clock < seconds:
                units += work()
            sync()
            elapsed, used = time.perf_counter() - clock, cpu_seconds() - cpu
            if counted >= 0:
                turns[name].append(Turn(units / elapsed, units / used))
    return turns


def run_ranks(script: str, world_size: int, *arguments: str, **variables: str) -> Any:
    """Run a script in `world_size` gloo processes and return the JSON that it writes to --output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world_size}", script, *arguments, f"--output={output}"]
        environment = os.environ | {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        subprocess.run(command, check=True, env=environment | variables)
        return json.loads(output.read_text())


def median_range(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(turns: Turns, name: str, base: str) -> dict[str, dict[str, float]]:
    """Return the speed of `name` relative to `base` in the same round, by CPU and by wall time."""
    pairs = list(zip(turns[name], turns[base], strict=True))
    return {
        "by_cpu": median_range([turn.by_cpu / other.by_cpu for turn, other in pairs]),
        "by_clock": median_range([turn.by_clock / other.by_clock for turn, other in pairs]),
    }


def machine() -> dict[str, Any]:
    """Return the hardware, versions, date and commit of a measurement."""
    return {
        "hardware": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
    }
