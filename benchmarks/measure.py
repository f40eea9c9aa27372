"""Measure side by side: pieces of work take turns, so that other work on the machine hits all alike."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from cifar_dist.training.environment import git_commit
from cifar_dist.utils.host import processor_name

Work = Callable[[], int]  # a piece of work; returns how many units it did


@dataclass(frozen=True)
class Turn:
    """What one turn did: units of work a second of the clock, and a second of CPU time."""

    by_clock: float
    by_cpu: float


Turns = Mapping[str, list[Turn]]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What all measurements of a report share."""

    data: Path
    accelerator: Accelerator
    backbone: str  # of the real networks, a name of timm's
    rounds: int
    seconds: float  # of a turn, at least

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def turns(self, works: Mapping[str, Work], *, seconds: float | None = None) -> Turns:
        return take_turns(
            works,
            rounds=self.rounds,
            seconds=self.seconds if seconds is None else seconds,
            settle=lambda: settle(self.device),
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measurement's result: for each row its turns, and what else was found."""

    unit: str  # what a turn counts
    turns: Turns
    facts: Mapping[str, Any]


def cpu_seconds() -> float:
    """CPU time of this process and of those it started and has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    works: Mapping[str, Work],
    *,
    rounds: int,
    seconds: float,
    settle: Callable[[], None] = lambda: None,
) -> dict[str, list[Turn]]:
    """A B C, A B C, ...: each turn calls a work once, and again until `seconds` are over.

    A round that is not counted comes first. `settle` waits for what a work has left to a device.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in works}
    for counted in range(-1, rounds):
        for name, work in works.items():
            units, clock, cpu = 0, time.perf_counter(), cpu_seconds()
            while not units or time.perf_counter() - clock < seconds:
                units += work()
            settle()
            elapsed, used = time.perf_counter() - clock, cpu_seconds() - cpu
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
        "commit": git_commit(),
    }
