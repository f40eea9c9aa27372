"""Terms -> numbers: sums on the device, one reduce a report, one flat JSON object a line."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist.engine.runtime import Ranks
from cifar_dist.engine.step import Step
from cifar_dist.files import write_file

Line = dict[str, Any]


class Window:
    """The sums since the last report, one row a shard, so that they are the same at any world size.

    `sums` is f32 [shards, terms], zero for other ranks' shards. Nothing here waits for the device
    until `read` is called.
    """

    def __init__(self, names: list[str], *, shards: int, device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(shards, len(names), device=device)
        self.skipped_in_a_row = torch.zeros((), dtype=torch.int32, device=device)
        self.steps = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def add(self, step: Step) -> None:
        for shard, terms in step.terms:
            self.sums[shard] += torch.stack([terms[name] for name in self.names]).sum(1)
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * step.skipped
        self.steps += 1

    def read(self) -> list[list[float]]:
        """All ranks' sums, [shards][terms]; each entry has one rank that contributes to it."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums.tolist()

    def restore(
        self,
        *,
        sums: list[list[float]],
        steps: int,
        seconds: float,
        skipped_in_a_row: int,
        ranks: Ranks,
    ) -> None:
        """Go on with the window that a checkpoint left open.

        Each rank carries the sums of its own shards, so that every later number meets the same
        partial sum, and is rounded alike, as without the restart.
        """
        self.clear()
        mine = slice(ranks.rank, None, ranks.world_size)
        self.sums[mine] = torch.tensor(sums, device=self.sums.device)[mine]
        self.skipped_in_a_row.fill_(skipped_in_a_row)
        self.steps, self.seconds = steps, seconds

    def clear(self) -> None:
        self.sums.zero_()
        self.steps, self.seconds = 0, 0.0
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training in the window, those before a restart included."""
        return self.seconds + time.perf_counter() - self.started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that an evaluation or a save takes."""
        begun = time.perf_counter()
        yield
        self.seconds -= time.perf_counter() - begun


def means(sums: list[list[float]], names: list[str], *, samples: int) -> dict[str, float]:
    """Sum over the shards in their order, divide once, by the count of samples."""
    totals = [math.fsum(column) for column in zip(*sums, strict=True)]
    return {name: total / samples for name, total in zip(names, totals, strict=True)}


class MetricsFile:
    """metrics.jsonl, the truth about a run: every line is flat and has kind, step and epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Line) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Line]:
        """The lines; one that a crash cut in the middle is left out."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def truncate(self, step: int) -> list[Line]:
        """Drop what a checkpoint at `step` has not seen; returns what remains."""
        kept = [line for line in self.read() if line["step"] <= step]
        if self.path.exists():
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        return kept


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: the allocator's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """loss, top1 and top5 (percent) of f32 [N, C] logits; computed on the CPU in float64."""
    logits, labels = logits.cpu().double(), labels.cpu()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return {
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "top1": 100.0 * best[:, 0].double().mean().item(),
        "top5": 100.0 * best.any(1).double().mean().item(),
    }
