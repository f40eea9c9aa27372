"""Choose the rows of each global batch as a pure function of the step.

The order of an epoch is a permutation keyed by (seed, epoch). Global batch g consists of the rows
[g * batch_size, (g + 1) * batch_size) of that order, split into micro-batches; rank r runs the
micro-batches r, r + world_size, ... Any rank of any world size can therefore start at any step, and
no sampler state is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cifar_dist.data.dataset import Split
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.random import generator


@dataclass(frozen=True, kw_only=True)
class Batch:
    split: Split
    rows: Tensor  # int64 [B], indices into the whole split, validation rows included
    epoch: int
    micro_batch: int
    copies: Tensor | None = None  # int64 [B], the copy index of each row; None without repetition

    @property
    def labels(self) -> Tensor:
        """Return the labels of the rows, int64 [B]."""
        return self.split.labels.index_select(0, self.rows)

    @property
    def images(self) -> Tensor:
        """Return the images without augmentation, uint8 [B, 3, S, S]."""
        return self.split.gather(self.rows)

    @property
    def table_index(self) -> Tensor:
        """Return indices, int64 [B], into a table that holds N rows for each copy."""
        if self.copies is None:
            return self.rows
        return self.rows + self.copies * len(self.split.labels)


def micro_batch_bounds(batch_size: int, micro_batches: int) -> list[tuple[int, int]]:
    """Return (start, end) of each micro-batch; sizes differ by at most one row."""
    edges = [batch_size * micro_batch // micro_batches for micro_batch in range(micro_batches + 1)]
    return list(pairwise(edges))


def num_steps_per_epoch(rows: int, batch_size: int) -> int:
    """Return the number of full batches in an epoch; raise UserError if there is none."""
    if rows < batch_size:
        raise UserError(
            f"run.batch_size={batch_size} exceeds the {rows} training rows; lower run.batch_size, or "
            "use more rows (data.val_size, data.fraction, data.long_tail)"
        )
    return rows // batch_size


def epoch_order(rows: Tensor, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """Return the rows in the order in which the epoch visits them, int64."""
    if not shuffle:
        return rows
    return rows[torch.randperm(len(rows), generator=generator("order", seed, epoch))]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How global batches are drawn and divided into micro-batches and ranks."""

    seed: int
    shuffle: bool
    batch_size: int  # of the global batch
    micro_batches: int
    rank: int = 0
    world_size: int = 1
    repeated: int = 1  # copies of each row


def train_batches(
    split: Split, rows: Tensor, plan: BatchPlan, *, start_step: int
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each global batch from `start_step` on, indefinitely.

    `rows` are the training rows (int64, CPU). The last partial batch of an epoch is dropped. With
    `plan.repeated` > 1 a batch contains that many adjacent copies of each row; the number of steps stays
    the same, so an epoch visits 1 / `plan.repeated` of the rows.
    """
    device = split.labels.device
    steps_per_epoch = len(rows) // plan.batch_size
    bounds = list(enumerate(micro_batch_bounds(plan.batch_size, plan.micro_batches)))
    epoch, first_batch = divmod(start_step, steps_per_epoch)
    while True:
        order = to_device(
            epoch_order(rows, seed=plan.seed, epoch=epoch, shuffle=plan.shuffle), device
        )
        copies = None
        if plan.repeated > 1:
            order = order.repeat_interleave(plan.repeated)
            copies = torch.arange(plan.repeated, device=device).repeat(len(rows))
        for batch in range(first_batch, steps_per_epoch):
            offset = batch * plan.batch_size
            yield [
                gather_batch(
                    split,
                    order[offset + start : offset + end],
                    epoch=epoch,
                    micro_batch=micro_batch,
                    copies=None if copies is None else copies[offset + start : offset + end],
                )
                for micro_batch, (start, end) in bounds[plan.rank :: plan.world_size]
            ]
        epoch, first_batch = epoch + 1, 0


def eval_blocks(
    split: Split, rows: Tensor, *, block_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Yield this rank's blocks of `rows`: rank b % world_size evaluates the whole of block b.

    A block contains the same rows at any world size, so its forward pass gives the same bits.
    """
    rows = rows.to(split.labels.device)
    for block in range(rank, -(-len(rows) // block_size), world_size):
        block_rows = rows[block * block_size : (block + 1) * block_size]
        yield gather_batch(split, block_rows, epoch=0, micro_batch=block)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; copies to a GPU are asynchronous, from pinned memory."""
    if device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def gather_batch(
    split: Split, rows: Tensor, *, epoch: int, micro_batch: int, copies: Tensor | None = None
) -> Batch:
    """Return the rows (int64 [B], on the split's device) as a Batch."""
    return Batch(split=split, rows=rows, epoch=epoch, micro_batch=micro_batch, copies=copies)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return a rank's micro-batches of one step as a single batch."""
    first, *others = batches
    if not others:
        return first
    copies = [batch.copies for batch in batches if batch.copies is not None]
    return replace(
        first,
        rows=torch.cat([batch.rows for batch in batches]),
        copies=torch.cat(copies) if copies else None,
    )
