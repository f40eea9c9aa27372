"""Terms -> numbers: sums on the device, one reduce a report, one flat JSON object a line."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist.distributed.context import Ranks
from cifar_dist.training.step import StepResult


class Window:
    """The sums since the last report, one row a shard, so that they are the same at any world size.

    `sums` is f32 [shards, terms], zero for other ranks' shards. A step that was left out counts in
    no sum. Nothing here waits for the device until it is read.
    """

    def __init__(self, names: list[str], *, shards: int, device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(shards, len(names), device=device)
        self.broken = torch.zeros(shards, len(names), dtype=torch.uint8, device=device)
        # int32: steps left out in a row, left out in the window, made before its first of these
        self.skips = torch.zeros(3, dtype=torch.int32, device=device)
        self.steps = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Add a step, whose terms are in the order of `names`."""
        broken, sums = self.broken[step.shards], self.sums[step.shards]  # views
        broken |= ~step.sums.isfinite()
        sums += step.sums.masked_fill(step.skipped, 0.0)
        in_a_row, skipped, before = self.skips  # views
        in_a_row.add_(1).mul_(step.skipped)
        skipped.add_(step.skipped)
        before.add_(skipped == 0)
        self.steps += 1

    def read(self) -> list[list[float]]:
        """All ranks' sums, [shards][terms]; each entry has one rank that contributes to it."""
        return summed(self.sums).tolist()

    def read_broken(self) -> list[list[int]]:
        """Which of all ranks' terms were not finite, as 0 or 1, [shards][terms]."""
        return summed(self.broken).tolist()

    def report(self, *, batch_size: int, may_skip: bool) -> dict[str, float]:
        """Each term's mean over the samples of the steps that were made (NaN: none was), and the pace."""
        skipped = int(self.skips[1])
        samples = (self.steps - skipped) * batch_size
        totals = [math.fsum(column) for column in zip(*self.read(), strict=True)]
        means = [total / samples if samples else math.nan for total in totals]
        return {
            **dict(zip(self.names, means, strict=True)),
            "images_per_second": self.steps * batch_size / self.elapsed(),
            **({"skipped": skipped} if may_skip else {}),
        }

    def what_broke(self, ranks: Ranks) -> str:
        """Which terms were not finite, and on which rank; all ranks call it together."""
        found = self.read_broken()
        places = [
            f"{name} on rank {shard % ranks.world_size}"
            for shard, row in enumerate(found)
            for name, broken in zip(self.names, row, strict=True)
            if broken and (name != "loss" or sum(row) == 1)  # it is the sum of the others
        ]
        return ", ".join(places) or "the gradient, though no loss was"

    def restore(
        self,
        *,
        names: list[str],
        sums: list[list[float]],
        steps: int,
        seconds: float,
        skips: list[int],
        ranks: Ranks,
        broken: list[list[int]] | None = None,
    ) -> None:
        """Go on with the window that a checkpoint left open.

        Each rank carries the sums of its own shards, so that every later number meets the same
        partial sum, and is rounded alike, as without the restart. With other terms or shards, which
        only force brings, what the open window held is in no report.
        """
        self.clear()
        if names != self.names or len(sums) != len(self.sums):
            return
        mine = slice(ranks.rank, None, ranks.world_size)
        self.sums[mine] = torch.tensor(sums, device=self.sums.device)[mine]
        if broken is not None:  # an older checkpoint does not say
            self.broken[mine] = torch.tensor(broken, dtype=torch.uint8)[mine].to(self.sums.device)
        self.skips = torch.tensor(skips, dtype=torch.int32, device=self.sums.device)
        self.steps, self.seconds = steps, seconds

    def clear(self) -> None:
        self.sums.zero_()
        self.broken.zero_()
        self.skips[1:] = 0
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


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
