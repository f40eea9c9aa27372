"""Measure side by side: pieces of work take turns, so that other work on the machine hits all alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cifar_dist.engine.run_folder import commit, processor_name


@dataclass(frozen=True)
class Turn:
    """What one turn did: units of work a second of the clock, and a second of this process's CPU."""

    by_clock: float
    by_cpu: float


Turns = Mapping[str, list[Turn]]


def take_turns(
    works: Mapping[str, Callable[[], int]], *, rounds: int, seconds: float
) -> dict[str, list[Turn]]:
    """A B C, A B C, ...: each turn calls a work (it returns the units it did) for `seconds`.

    A round that is not counted comes first.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, work in works.items():
            units, clock, cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - clock < seconds:
                units += work()
            elapsed, used = time.perf_counter() - clock, time.process_time() - cpu
            if counted >= 0:
                turns[name].append(Turn(units / elapsed, units / used))
    return turns


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratios(turns: Turns, name: str, base: str) -> dict[str, dict[str, float]]:
    """How many times as fast `name` was as `base` in the same round, by CPU time and by the clock."""
    pairs = list(zip(turns[name], turns[base], strict=True))
    return {
        "by_cpu": spread([turn.by_cpu / other.by_cpu for turn, other in pairs]),
        "by_clock": spread([turn.by_clock / other.by_clock for turn, other in pairs]),
    }


def machine() -> dict[str, Any]:
    """What a measurement on the CPU depends on beside the code."""
    return {
        "hardware": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
