"""Split -> Batch: which rows make up which global batch, as a pure function of the step.

The plan of an epoch is a permutation keyed by (seed, epoch). Global batch g of an epoch is rows
[g * batch_size, (g + 1) * batch_size) of it, cut into shards; rank r runs shards r, r + W, ...
So any rank of any world can start at any step, and nothing about the order is ever saved.
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
    rows: Tensor  # int64 [B]; a row's number in the split, whatever is held out
    epoch: int
    micro_batch: int
    copies: Tensor | None = None  # int64 [B], which copy of its row each is; None: there is one

    @property
    def labels(self) -> Tensor:
        """The labels of the rows, int64 [B]."""
        return self.split.labels.index_select(0, self.rows)

    @property
    def images(self) -> Tensor:
        """uint8 [B, 3, 32, 32]: the rows' pictures as they are."""
        return self.split.gather(self.rows)

    @property
    def table_index(self) -> Tensor:
        """int64 [B]: where each is in a table of N rows for each copy of a row."""
        if self.copies is None:
            return self.rows
        return self.rows + self.copies * len(self.split.labels)


def micro_batch_bounds(batch_size: int, micro_batches: int) -> list[tuple[int, int]]:
    """Where each micro-batch of a global batch begins and ends; sizes differ by at most one row."""
    edges = [batch_size * micro_batch // micro_batches for micro_batch in range(micro_batches + 1)]
    return list(pairwise(edges))


def num_steps_per_epoch(rows: int, batch_size: int) -> int:
    """How many whole batches the rows make; UserError where it is not one."""
    if rows < batch_size:
        raise UserError(
            f"run.batch_size={batch_size} is more than the {max(rows, 0)} rows to train on; lower it, "
            "or data.val_size"
        )
    return rows // batch_size


def check_val_size(val_size: int, *, classes: int, rows: int) -> None:
    """UserError where `count` of so many rows cannot be held out with as many of each class."""
    if val_size % classes or val_size >= rows:
        raise UserError(
            f"data.val_size={val_size}: give a multiple of {classes} (the classes) below {rows} (the rows)"
        )


def split_train_val(labels: Tensor, val_size: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and `count` rows held out, stratified by class; both ascending, int64.

    The choice depends on the labels and on `count` alone, so all seeds and recipes share it.
    """
    classes = int(labels.max()) + 1
    check_val_size(val_size, classes=classes, rows=len(labels))
    fewest = int(torch.bincount(labels, minlength=classes).min())
    if val_size // classes >= fewest:
        raise UserError(
            f"data.val_size={val_size}: that is {val_size // classes} rows of each class, and one class has "
            f"{fewest}; give less"
        )
    order = torch.randperm(len(labels), generator=generator("holdout"))
    by_class = order[torch.argsort(labels.cpu()[order], stable=True)]
    first = torch.searchsorted(labels.cpu()[by_class].contiguous(), torch.arange(classes))
    held = (first[:, None] + torch.arange(val_size // classes)).flatten()
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[by_class[held]] = True
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()


def epoch_order(rows: Tensor, *, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The rows in the order in which this epoch visits them, int64."""
    if not shuffle:
        return rows
    return rows[torch.randperm(len(rows), generator=generator("order", seed, epoch))]


def train_batches(
    split: Split,
    rows: Tensor,
    *,
    seed: int,
    shuffle: bool,
    batch_size: int,
    micro_batches: int,
    start_step: int,
    rank: int,
    world_size: int,
    repeated: int = 1,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each global batch, from `start_step` on, without an end.

    `rows` are the rows to train on (int64, CPU). An epoch's last partial batch is dropped. With
    `repeats` a batch has that many copies of each of its rows, side by side, so an epoch of as many
    steps shows only one row in `repeats`.
    """
    device = split.labels.device
    steps_per_epoch = len(rows) // batch_size
    bounds = micro_batch_bounds(batch_size, micro_batches)
    mine = range(rank, micro_batches, world_size)
    epoch, first_batch = divmod(start_step, steps_per_epoch)
    while True:
        order = send(epoch_order(rows, seed=seed, epoch=epoch, shuffle=shuffle), device)
        copies = None
        if repeated > 1:
            order = order.repeat_interleave(repeated)
            copies = torch.arange(repeated, device=device).repeat(len(rows))
        for batch in range(first_batch, steps_per_epoch):
            start = batch * batch_size
            yield [
                gather_batch(
                    split,
                    order[start + begin : start + end],
                    epoch=epoch,
                    micro_batch=micro_batch,
                    copies=None if copies is None else copies[start + begin : start + end],
                )
                for micro_batch, (begin, end) in (
                    (micro_batch, bounds[micro_batch]) for micro_batch in mine
                )
            ]
        epoch, first_batch = epoch + 1, 0


def eval_blocks(
    split: Split, rows: Tensor, *, block_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's blocks of `rows`: block b goes whole to rank b % world_size.

    A block has the same rows at any world size, so its forward has the same bits.
    """
    rows = rows.to(split.labels.device)
    for block in range(rank, -(-len(rows) // block_size), world_size):
        block_rows = rows[block * block_size : (block + 1) * block_size]
        yield gather_batch(split, block_rows, epoch=0, micro_batch=block)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to a device; to a GPU without waiting for what it still has to do."""
    if device.type == "cuda" and torch.cuda.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def gather_batch(
    split: Split, rows: Tensor, *, epoch: int, micro_batch: int, copies: Tensor | None = None
) -> Batch:
    """The rows (int64 [B], on the split's device) as a Batch."""
    return Batch(split=split, rows=rows, epoch=epoch, micro_batch=micro_batch, copies=copies)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Return the rows of a rank's micro-batches of one step as one batch."""
    first, *others = batches
    if not others:
        return first
    copies = [batch.copies for batch in batches if batch.copies is not None]
    return replace(
        first,
        rows=torch.cat([batch.rows for batch in batches]),
        copies=torch.cat(copies) if copies else None,
    )
