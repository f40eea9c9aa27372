"""Batches as training shows them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cifar_dist.data.augment.augmentation import Augment, AugmentedBatch
from cifar_dist.data.batches import Batch, concatenate, train_batches
from cifar_dist.data.dataset import Split

ROWS = torch.arange(5, 64)  # the others are held out


def plan(split: Split, rows: Tensor = ROWS, **keys: Any) -> Iterator[list[Batch]]:
    """Five steps an epoch of three micro-batches that differ in size, from the second step on."""
    settings: dict[str, Any] = {"seed": 3, "shuffle": True, "batch_size": 10, "micro_batches": 3}
    settings |= {"start_step": 1, "rank": 0, "world_size": 1}
    return train_batches(split, rows, **settings | keys)


def shown(
    augment: Augment, batches: Iterator[list[Batch]], *, steps: int = 12
) -> list[AugmentedBatch]:
    return [augment(concatenate(micro_batches)) for micro_batches in islice(batches, steps)]
