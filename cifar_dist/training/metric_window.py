"""Terms -> numbers: sums on the device, one reduce a report, one flat JSON object a line."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from cifar_dist.distributed.context import DistContext
from cifar_dist.training.step import StepResult


class MetricWindow:
    """The sums since the last report, one row a micro-batch, so that they are the same at any world size.

    `sums` is f32 [micro-batches, terms], zero for other ranks' micro-batches. A step that was left out counts in
    no sum. Nothing here waits for the device until it is read.
    """

    def __init__(self, names: list[str], *, micro_batches: int, device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(micro_batches, len(names), device=device)
        self.nonfinite = torch.zeros(micro_batches, len(names), dtype=torch.uint8, device=device)
        # int32: steps left out in a row, left out in the window, made before its first of these
        self.skips = torch.zeros(3, dtype=torch.int32, device=device)
        self.steps = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Add a step, whose terms are in the order of `names`."""
        broken, sums = self.nonfinite[step.micro_batches], self.sums[step.micro_batches]  # views
        broken |= ~step.sums.isfinite()
        sums += step.sums.masked_fill(step.skipped, 0.0)
        in_a_row, skipped, before = self.skips  # views
        in_a_row.add_(1).mul_(step.skipped)
        skipped.add_(step.skipped)
        before.add_(skipped == 0)
        self.steps += 1

    def read(self) -> list[list[float]]:
        """All ranks' sums, [micro-batches][terms]; each entry has one rank that contributes to it."""
        return all_reduce_sum(self.sums).tolist()

    def read_nonfinite(self) -> list[list[int]]:
        """Which of all ranks' terms were not finite, as 0 or 1, [micro-batches][terms]."""
        return all_reduce_sum(self.nonfinite).tolist()

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

    def nonfinite_terms(self, context: DistContext) -> str:
        """Which terms were not finite, and on which rank; all ranks call it together."""
        found = self.read_nonfinite()
        places = [
            f"{name} on rank {micro_batch % context.world_size}"
            for micro_batch, row in enumerate(found)
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
        context: DistContext,
        nonfinite: list[list[int]] | None = None,
    ) -> None:
        """Go on with the window that a checkpoint left open.

        Each rank carries the sums of its own micro-batches, so that every later number meets the same
        partial sum, and is rounded alike, as without the restart. With other terms or micro-batches, which
        only force brings, what the open window held is in no report.
        """
        self.clear()
        if names != self.names or len(sums) != len(self.sums):
            return
        mine = slice(context.rank, None, context.world_size)
        self.sums[mine] = torch.tensor(sums, device=self.sums.device)[mine]
        if nonfinite is not None:  # an older checkpoint does not say
            self.nonfinite[mine] = torch.tensor(nonfinite, dtype=torch.uint8)[mine].to(
                self.sums.device
            )
        self.skips = torch.tensor(skips, dtype=torch.int32, device=self.sums.device)
        self.steps, self.seconds = steps, seconds

    def clear(self) -> None:
        self.sums.zero_()
        self.nonfinite.zero_()
        self.skips[1:] = 0
        self.steps, self.seconds = 0, 0.0
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training in the window, those before a restart included."""
        return self.seconds + time.perf_counter() - self.started

    @contextmanager
    def timer_paused(self) -> Iterator[None]:
        """Leave out the time that an evaluation or a save takes."""
        begun = time.perf_counter()
        yield
        self.seconds -= time.perf_counter() - begun


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
