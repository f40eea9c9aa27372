"""Accumulate the terms of the training steps on the device, and reduce them once per log."""

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
    """Sums since the last log, one row per micro-batch, so that they do not depend on the world size.

    `sums` is f32 [micro-batches, terms], zero for the micro-batches of other ranks. Skipped steps are not
    counted. Only reading waits for the device.
    """

    def __init__(self, names: list[str], *, micro_batches: int, device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(micro_batches, len(names), device=device)
        self.nonfinite = torch.zeros(micro_batches, len(names), dtype=torch.uint8, device=device)
        # int32: consecutive skips, skips in the window, steps before the first of these
        self.skips = torch.zeros(3, dtype=torch.int32, device=device)
        self.steps = 0
        self.seconds = 0.0
        self.started = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Add the terms of a step, in the order of `names`."""
        nonfinite, sums = self.nonfinite[step.micro_batches], self.sums[step.micro_batches]  # views
        nonfinite |= ~step.sums.isfinite()
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
        """Return the mean of each term over the samples (NaN without any), and images per second."""
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
        """Return which terms were not finite on which rank, as text. Collective."""
        nonfinite = self.read_nonfinite()
        terms = [
            f"{name} on rank {micro_batch % context.world_size}"
            for micro_batch, row in enumerate(nonfinite)
            for name, is_nonfinite in zip(self.names, row, strict=True)
            if is_nonfinite and (name != "loss" or sum(row) == 1)  # it is the sum of the others
        ]
        return ", ".join(terms) or "the gradient, though all losses are finite"

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
        """Continue the window of a checkpoint.

        Each rank takes the sums of its own micro-batches, so that later sums are rounded exactly as
        without the restart.
        """
        assert names == self.names, "a changed recipe is refused"
        assert len(sums) == len(self.sums)
        self.clear()
        local = slice(context.rank, None, context.world_size)
        self.sums[local] = torch.tensor(sums, device=self.sums.device)[local]
        if nonfinite is not None:  # not in older checkpoints
            self.nonfinite[local] = torch.tensor(nonfinite, dtype=torch.uint8)[local].to(
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
        """Return the seconds of training in the window, including those before a restart."""
        return self.seconds + time.perf_counter() - self.started

    @contextmanager
    def timer_paused(self) -> Iterator[None]:
        """Do not count the time inside the context."""
        start = time.perf_counter()
        yield
        self.seconds -= time.perf_counter() - start


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
