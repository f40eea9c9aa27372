"""Global batches: each row once per epoch, the same for any rank, world size and start."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from cifar_dist.data.batches import (
    BatchPlan,
    epoch_order,
    eval_blocks,
    micro_batch_bounds,
    train_batches,
)
from cifar_dist.data.dataset import Split, load_split
from cifar_dist.data.training_rows import split_train_val
from cifar_dist.utils.errors import UserError


@pytest.fixture
def split(data: Path) -> Split:
    return load_split(data, "train")


def plan(
    split: Split, *, steps: int, start: int = 0, micro_batches: int = 3, world_size: int = 1
) -> list:
    """Return sorted pairs ((step, micro_batch), rows) of all ranks."""
    batch_rows = {}
    for rank in range(world_size):
        batches = train_batches(
            split,
            torch.arange(64),
            BatchPlan(
                seed=7,
                shuffle=True,
                batch_size=10,
                micro_batches=micro_batches,
                rank=rank,
                world_size=world_size,
            ),
            start_step=start,
        )
        for step, parts in enumerate(islice(batches, steps - start), start):
            for part in parts:
                batch_rows[step, part.micro_batch] = part.rows.tolist()
    return sorted(batch_rows.items())


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 5, 6, 11])
def test_batches_depend_only_on_seed_and_step(split: Split, world_size: int, start: int) -> None:
    whole = plan(split, steps=14)
    later = [pair for pair in whole if pair[0][0] >= start]
    assert plan(split, steps=14, start=start, world_size=world_size) == later


def test_epoch_visits_each_row_at_most_once_and_drops_the_last_partial_batch(split: Split) -> None:
    rows = [row for (step, _), rows in plan(split, steps=6) for row in rows]
    assert len(rows) == 60
    assert len(set(rows)) == 60
    first, second = (epoch_order(torch.arange(64), seed=7, epoch=e, shuffle=True) for e in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(64))
    assert first.tolist() != second.tolist()
    assert epoch_order(torch.arange(64), seed=7, epoch=1, shuffle=False).tolist() == list(range(64))


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(10, 3), (250, 4), (7, 7), (1000, 6)])
def test_micro_batch_sizes_differ_by_at_most_one(batch_size: int, micro_batches: int) -> None:
    bounds = micro_batch_bounds(batch_size, micro_batches)
    sizes = [end - begin for begin, end in bounds]
    assert sum(sizes) == batch_size
    assert max(sizes) - min(sizes) <= 1
    assert [begin for begin, _ in bounds[1:]] == [end for _, end in bounds[:-1]]


def test_batch_has_the_images_and_labels_of_its_rows(split: Split) -> None:
    (batch,) = next(
        train_batches(
            split,
            torch.arange(64),
            BatchPlan(seed=0, shuffle=True, batch_size=10, micro_batches=1),
            start_step=3,
        )
    )
    assert torch.equal(batch.images, split.images[batch.rows])
    assert torch.equal(batch.labels, split.labels[batch.rows])
    assert batch.images.dtype == torch.uint8


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_eval_blocks_are_not_split_and_cover_all_rows(split: Split, world_size: int) -> None:
    rows = torch.arange(64)
    blocks = {}
    for rank in range(world_size):
        for block in eval_blocks(split, rows, block_size=10, rank=rank, world_size=world_size):
            assert block.micro_batch not in blocks
            blocks[block.micro_batch] = block.rows
    assert torch.equal(torch.cat([blocks[index] for index in sorted(blocks)]), rows)
    assert [len(blocks[index]) for index in sorted(blocks)] == [10] * 6 + [4]


def test_validation_rows_are_stratified_constant_and_disjoint() -> None:
    labels = torch.arange(5).repeat(40)[torch.randperm(200, generator=torch.manual_seed(0))]
    rows, val_rows = split_train_val(labels, 50)
    assert sorted([*rows.tolist(), *val_rows.tolist()]) == list(range(200))
    assert torch.equal(labels[val_rows].bincount(), torch.full((5,), 10))
    assert torch.equal(val_rows, val_rows.sort().values)
    assert torch.equal(val_rows, split_train_val(labels, 50)[1])
    for val_size in (51, 200, 400):
        with pytest.raises(UserError, match=f"data.val_size={val_size}"):
            split_train_val(labels, val_size)
    unbalanced = torch.tensor([0] * 500 + [1] * 500 + [2] * 20)
    with pytest.raises(UserError, match="100 rows of each class, but one class has only 20"):
        split_train_val(unbalanced, 300)
