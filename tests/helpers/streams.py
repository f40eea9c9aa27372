"""Batches in training order, and their augmented images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment, AugmentedBatch
from cifar_dist.data.batches import Batch, BatchPlan, concatenate, train_batches
from cifar_dist.data.dataset import Split

ROWS = torch.arange(5, 64)  # the training rows; the others are validation rows


def plan(split: Split, rows: Tensor = ROWS, **options: Any) -> Iterator[list[Batch]]:
    """Yield batches of three micro-batches of unequal size, five steps per epoch, from step 1 on."""
    start_step = options.pop("start_step", 1)
    defaults: dict[str, Any] = {"seed": 3, "shuffle": True, "batch_size": 10, "micro_batches": 3}
    return train_batches(split, rows, BatchPlan(**defaults | options), start_step=start_step)


def augment_steps(
    augment: Augment, batches: Iterator[list[Batch]], *, steps: int = 12
) -> list[AugmentedBatch]:
    return [augment(concatenate(micro_batches)) for micro_batches in islice(batches, steps)]
